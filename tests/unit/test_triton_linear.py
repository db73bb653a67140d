"""Batch-invariant products and norms in Triton: against their plain twins, and bit for bit in every batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.triton_interpreter import DEVICE, make_rows_alike  # isort: skip

from slipstream.kernels import reference
from slipstream.kernels.linear import linear, rms_norm
from slipstream.kernels.triton.linear import tile_of

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture
def _rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    make_rows_alike(monkeypatch)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("shape", "columns", "bias"), [((70,), 33, True), ((1, 3), 64, False), ((2, 0), 5, True)])
def test_linear_equals_its_twin(dtype: torch.dtype, shape: tuple[int, ...], columns: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 150).to(DEVICE, dtype), torch.randn(columns, 150).to(DEVICE, dtype)
    offset = torch.randn(columns).to(DEVICE, dtype) if bias else None
    got = linear(x, weight, offset, "triton")
    assert got.shape == (*shape, columns)
    expected = reference.linear(x, weight, offset)
    torch.testing.assert_close(got, expected, atol=10 * BOUNDS[dtype], rtol=BOUNDS[dtype])
    exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    torch.testing.assert_close(expected.double(), exact, atol=10 * BOUNDS[dtype], rtol=BOUNDS[dtype])


@pytest.mark.usefixtures("_rows_alike")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(70, 200).to(DEVICE, dtype), torch.randn(40, 200).to(DEVICE, dtype)
    scale = torch.randn(200).to(DEVICE, dtype)
    together, normed = linear(x, weight, backend="triton"), rms_norm(x, scale, 1e-5, backend="triton")
    for rows in (slice(0, 1), slice(5, 22), slice(64, 70), slice(3, 70, 3)):
        assert torch.equal(linear(x[rows], weight, backend="triton"), together[rows])
        assert torch.equal(rms_norm(x[rows], scale, 1e-5, backend="triton"), normed[rows])


def test_the_twins_rows_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(37, 200), torch.randn(40, 200)
    together = reference.linear(x, weight)
    for rows in (slice(0, 1), slice(5, 22), slice(30, 37)):
        assert torch.equal(reference.linear(x[rows], weight), together[rows])


def test_tiles_follow_the_layer_alone() -> None:
    assert tile_of(151936, torch.bfloat16)[:2] == (64, 128)
    assert tile_of(9728, torch.bfloat16)[1] == 64
    assert tile_of(896, torch.bfloat16)[1] == 32
    assert tile_of(151936, torch.float32)[0] == 32


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("unit_offset", "round_first"), [(False, True), (True, False), (False, False)])
def test_norms_equal_their_twin(dtype: torch.dtype, unit_offset: bool, round_first: bool) -> None:
    torch.manual_seed(3)
    x, weight = (5 * torch.randn(2, 3, 90)).to(DEVICE, dtype), torch.randn(90).to(DEVICE, dtype)
    got = rms_norm(x, weight, 1e-6, unit_offset, round_first, backend="triton")
    expected = reference.rms_norm(x, weight, 1e-6, unit_offset, round_first)
    torch.testing.assert_close(got, expected, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact * (weight.double() + unit_offset)
    torch.testing.assert_close(got.double(), exact, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: linear(x, torch.zeros(4, 7)), r"weight has shape \[4, 7\]; allowed: \[N, 6\]"),
        (lambda x: linear(x, torch.zeros(4, 6), torch.zeros(3)), r"bias has shape \[3\]; allowed: \[4\]"),
        (lambda x: linear(x, torch.zeros(4, 6).half()), "weight is torch.float16 on cpu; allowed: torch.float32"),
        (lambda x: linear(x.long(), torch.zeros(4, 6)), "x is torch.int64"),
        (lambda x: rms_norm(x, torch.zeros(5), 1e-5), r"weight has shape \[5\]; allowed: \[6\]"),
    ],
)
def test_mistakes_are_one_readable_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 6))

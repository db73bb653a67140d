"""The steering rotation: both backends against the formula, its properties, and what must stay bit-equal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.kernels.dispatch import pick_backend
from slipstream.kernels.steer import steer, steer_reference
from tests.triton_interpreter import DEVICE

both_backends = pytest.mark.parametrize("backend", ["reference", "triton"])
SHAPES = [(4, 3, 40, 1), (2, 1, 100, 5), (3, 40, 64, 2), (1, 2, 1, 1), (2, 1, 2500, 3)]
"""(T, heads, D, R): several heads a program, one head, several programs a token, one element, a wide residual."""


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Random x [T, heads, D], directions [heads, R, D] of any length, strength [heads, R] in -4 .. 2."""
    num_tokens, num_heads, width, num_directions = shape
    generator = torch.Generator().manual_seed(width)
    x = torch.randn((num_tokens, num_heads, width), generator=generator).to(DEVICE, dtype)
    directions = torch.randn((num_heads, num_directions, width), generator=generator) * 7.0
    strength = torch.rand((num_heads, num_directions), generator=generator) * 6.0 - 4.0
    return x, directions.to(DEVICE), strength.to(DEVICE)


def formula(x: Tensor, directions: Tensor, strength: Tensor) -> Tensor:
    """The released code's order, in float64: every direction in turn, the norm restored after each."""
    x, directions = x.double(), directions.double()
    for index in range(directions.shape[1]):
        unit = directions[:, index] / directions[:, index].norm(dim=-1, keepdim=True)
        y = x + strength[:, index, None].double() * (x * unit).sum(-1, keepdim=True) * unit
        x = y * x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True)
    return x


@both_backends
@pytest.mark.parametrize("shape", SHAPES)
def test_one_restore_equals_the_released_order(backend: Any, shape: tuple[int, int, int, int]) -> None:
    x, directions, strength = problem(shape)
    result = steer(x, directions, strength, backend=backend)
    torch.testing.assert_close(result.double(), formula(x, directions, strength), atol=2e-5, rtol=2e-5)
    norms = x.norm(dim=-1)
    assert ((result.norm(dim=-1) - norms).abs() <= 1e-5 * norms).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_the_twin(shape: tuple[int, int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    x, directions, strength = problem(shape, dtype)
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(strength.shape, generator=generator) < 0.7).to(DEVICE)
    token_mask = (torch.rand(len(x), generator=generator) < 0.7).to(DEVICE)
    expected = steer_reference(x, directions, strength, mask, token_mask)
    result = steer(x, directions, strength, mask, token_mask, backend="triton")
    assert result.dtype == dtype
    # Another order of the sums, and in bfloat16 one unit in the last place (the interpreter cuts instead of rounding).
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=tolerance)


@both_backends
def test_full_removal_leaves_nothing_along_the_direction(backend: Any) -> None:
    x, directions, _ = problem((6, 3, 48, 1))
    result = steer(x, directions[:, 0], -1.0, backend=backend)
    unit = directions[:, 0] / directions[:, 0].norm(dim=-1, keepdim=True)
    assert ((result * unit).sum(-1).abs() < 1e-5 * x.norm(dim=-1)).all()
    assert not torch.equal(result, x)


@both_backends
def test_a_strength_below_minus_one_flips_the_component(backend: Any) -> None:
    unit = torch.tensor([[1.0, 0.0]], device=DEVICE)
    x = torch.tensor([[[3.0, 4.0]]], device=DEVICE)
    # 3 becomes 3 - 4 * 3 = -9; (-9, 4) is brought back to length 5.
    expected = torch.tensor([[[-9.0, 4.0]]], device=DEVICE) * (5.0 / math.sqrt(97.0))
    torch.testing.assert_close(steer(x, unit, -4.0, backend=backend), expected)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_not_steered_is_bit_equal(backend: Any, dtype: torch.dtype, inplace: bool) -> None:
    x, directions, strength = problem((6, 8, 24, 2), dtype)
    x[0, 3], x[1, 3], x[2, 3, 5] = 0.0, -0.0, math.nan
    directions[1] = 0.0
    strength[2] = 0.0
    mask = torch.ones((8, 2), dtype=torch.bool, device=DEVICE)
    mask[0] = False
    token_mask = torch.ones(6, dtype=torch.bool, device=DEVICE)
    token_mask[5] = False
    before = x.clone()
    result = steer(x, directions, strength, mask, token_mask, inplace, backend)
    assert (result is x) == inplace
    assert inplace or torch.equal(x.view(torch.uint8), before.view(torch.uint8))
    unchanged = torch.zeros((6, 8), dtype=torch.bool, device=DEVICE)
    unchanged[:, :3] = unchanged[:3, 3] = unchanged[5] = True
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    same = (result.view(bits) == before.view(bits)).all(-1)
    assert torch.equal(same, unchanged)


@both_backends
def test_a_masked_direction_does_not_count(backend: Any) -> None:
    x, directions, strength = problem((4, 3, 32, 3))
    mask = torch.tensor([True, False, True], device=DEVICE).expand(3, 3)
    result = steer(x, directions, strength, mask, backend=backend)
    expected = steer(x, directions[:, [0, 2]], strength[:, [0, 2]], backend=backend)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


@both_backends
@pytest.mark.parametrize("scale", [1e-30, 1e25, 3e37])
def test_norms_neither_overflow_nor_underflow(backend: Any, scale: float) -> None:
    x, directions, strength = problem((3, 2, 32, 2))
    expected = steer(x, directions, strength, backend=backend).double() * scale
    torch.testing.assert_close(
        steer(x * scale, directions, strength, backend=backend).double(), expected, atol=1e-5 * scale, rtol=1e-5
    )
    again = steer(x, directions / 7.0 * scale, strength, backend=backend).double() * scale
    torch.testing.assert_close(again, expected, atol=1e-5 * scale, rtol=1e-5)


@both_backends
def test_a_vector_of_which_nothing_is_left_stays(backend: Any) -> None:
    _, directions, _ = problem((1, 3, 48, 1))
    x = directions[None, :, 0] * torch.tensor([0.3, -5.0, 1e-4], device=DEVICE)[None, :, None]
    assert torch.equal(steer(x, directions[:, 0], -1.0, backend=backend), x)


@both_backends
@pytest.mark.parametrize("inplace", [False, True])
def test_views_with_any_strides(backend: Any, inplace: bool) -> None:
    x, directions, strength = problem((5, 4, 24, 2))
    # Heads before tokens in memory, with a gap after each token.
    holder = torch.full((4, 5, 30), 7.0, device=DEVICE)
    view = holder[:, :, :24].transpose(0, 1)
    view.copy_(x)
    across = directions.transpose(0, 2).contiguous().transpose(0, 2)
    result = steer(view, across, strength, inplace=inplace, backend=backend)
    torch.testing.assert_close(result, steer_reference(x, directions, strength), atol=1e-5, rtol=1e-5)
    assert (holder[:, :, 24:] == 7.0).all()
    assert torch.equal(view, result if inplace else x)


@both_backends
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_nothing_to_steer(backend: Any, shape: tuple[int, int, int]) -> None:
    x = torch.zeros(shape, device=DEVICE)
    assert steer(x, torch.zeros(shape[1:], device=DEVICE), -1.0, backend=backend).shape == shape
    some = torch.ones((2, 3, 8), device=DEVICE)
    assert torch.equal(steer(some, torch.zeros((3, 0, 8), device=DEVICE), -1.0, backend=backend), some)


@both_backends
def test_gradients_reach_x(backend: Any) -> None:
    x, directions, strength = problem((3, 4, 20, 2))
    x[0, 0] = 0.0
    mask = torch.tensor([True, True, True, False], device=DEVICE)[:, None].expand(4, 2)
    x.requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (actual,) = torch.autograd.grad(steer(x, directions, strength, mask, backend=backend), [x], upstream)
    turned = x.detach()[1:, :3].double().requires_grad_()
    expected = torch.autograd.grad(formula(turned, directions[:3], strength[:3]), [turned], upstream[1:, :3].double())
    torch.testing.assert_close(actual[1:, :3].double(), expected[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(actual[:, 3], upstream[:, 3])
    assert torch.equal(actual[0, 0], upstream[0, 0])
    with pytest.raises(ValueError, match="inplace is True"):
        steer(x, directions, strength, inplace=True, backend=backend)
    with torch.no_grad():
        steer(x, directions, strength, inplace=True, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"x is torch.float32 \[2, 8\]; allowed: .* \[T, heads, D\]"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.float64)}, "x is torch.float64"),
        (
            {"directions": torch.zeros(3, 7)},
            r"directions are torch.float32 \[3, 7\]; allowed: .* \[3, 8\] or \[3, R, 8\]",
        ),
        ({"directions": torch.zeros(3, 8, dtype=torch.int64)}, "directions are torch.int64"),
        ({"strength": torch.zeros(2)}, r"strength is torch.float32 \[2\]; allowed: a number, or floating point \[3\]"),
        ({"mask": torch.zeros(3)}, r"mask is torch.float32 \[3\]; allowed: torch.bool \[3\]"),
        ({"token_mask": torch.ones(3, dtype=torch.bool)}, r"token_mask is torch.bool \[3\]; allowed: torch.bool \[2\]"),
        ({"directions": torch.zeros(3, 8, device="meta")}, "directions is on meta; allowed: cpu"),
        ({"backend": "native"}, "backend is 'native'; allowed: auto, triton, reference"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 3, 8), "directions": torch.zeros(3, 8), "strength": -1.0}
    with pytest.raises(ValueError, match=message) as caught:
        steer(**(arguments | change))
    assert "\n" not in str(caught.value)


def test_auto_follows_the_device() -> None:
    assert pick_backend("auto", torch.device("cpu")) == "reference"
    assert pick_backend("auto", torch.device("cuda")) == "triton"
    assert pick_backend("reference", torch.device("cuda")) == "reference"

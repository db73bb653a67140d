"""Native linear layers, norms and gates: against the plain twins, for every instruction set, batch and thread count."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from slipstream.kernels import _native, reference  # type: ignore[attr-defined]
from slipstream.kernels.native_layers import adopt_layers
from slipstream.kernels.native_set import NativeKernels, Products, new_packed
from slipstream.kernels.packed_linear import PackedLinear, as_numpy, pack_linears
from slipstream.rollout.runners import one_torch_thread


def contexts() -> list[Any]:
    """One context of every instruction set that this machine has, without AMX; the last one with threads and AMX."""
    names = ("plain", "avx2", "avx512")
    best = names.index(_native.Context(1).isa)
    return [_native.Context(1, isa=name, amx=False) for name in names[: best + 1]] + [_native.Context(3)]


@torch.inference_mode(False)
def new_linear(k: int, n: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(k, n, bias=bias).to(dtype)


def packed(layer: nn.Linear, context: Any, products: Products = "fma") -> PackedLinear:
    return PackedLinear(layer, new_packed(layer, products), context)


PRODUCTS: list[Products] = ["fma", "tiles"]
# Widths below, at and above a panel of 32; depths beyond one stretch of 512; rows around every tile.
SHAPES = [(1, 3), (32, 16), (33, 1), (261, 128), (70, 1100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("products", PRODUCTS)
@torch.inference_mode()
def test_linear_equals_its_twin_in_the_same_bits_everywhere(
    n: int, k: int, bias: bool, dtype: torch.dtype, products: Products
) -> None:
    torch.manual_seed(n)
    layer = new_linear(k, n, bias, dtype)
    x = torch.randn(107, k).to(dtype)
    outputs = [packed(layer, context, products)(x) for context in contexts()]
    tolerance = {"atol": 3e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-5, "rtol": 2**-7}
    if products == "tiles":
        # What two bfloat16 leave out of a float32: 2^-17 of the largest terms.
        tolerance["atol"] = 2e-5 * float(layer.weight.abs().max()) * k**0.5 + 1e-5
    torch.testing.assert_close(outputs[0], reference.linear(x, layer.weight, layer.bias), **tolerance)
    for other in outputs[1:]:
        assert torch.equal(outputs[0], other)
    for rows in (1, 2, 3, 4, 5, 11, 12, 13, 16, 17, 31, 32, 33, 48, 97):
        assert torch.equal(packed(layer, contexts()[-1], products)(x[:rows]), outputs[0][:rows]), rows


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_bad_row_stays_alone(products: Products, bad: float, dtype: torch.dtype) -> None:
    layer = new_linear(40, 50, True, dtype)
    x = torch.randn(9, 40).to(dtype)
    for context in contexts():
        clean = packed(layer, context, products)(x)
        dirty_x = x.clone()
        dirty_x[4, 7] = bad
        dirty = packed(layer, context, products)(dirty_x)
        assert not dirty[4].isfinite().any()
        keep = torch.arange(9) != 4
        assert torch.equal(clean[keep], dirty[keep])


def halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 values as the sum of two bfloat16 (kept as float32), rounded to the nearest, ties to even."""
    high = torch.from_numpy(values).bfloat16().float().numpy()
    return high, torch.from_numpy(values - high).bfloat16().float().numpy()


def fused(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """left * right + total, rounded once: products of two bfloat16 are exact in float64, and so is the sum of one and
    a float32 wherever the two are less than 2^28 apart, as here."""
    return (left.astype(np.float64) * right + total).astype(np.float32)


@torch.inference_mode()
def test_tiles_have_the_bits_that_they_are_defined_by() -> None:
    """csrc/tiles.h, in numpy: of every 32 inputs an even and an odd chain, added to the sum plane by plane."""
    rng = np.random.default_rng(4)
    x, weight = rng.uniform(0.5, 2.0, (5, 70)).astype(np.float32), rng.uniform(0.5, 2.0, (9, 70)).astype(np.float32)
    expected = np.zeros((5, 9), np.float32)
    padded_x, padded_weight = np.pad(x, ((0, 0), (0, 26))), np.pad(weight, ((0, 0), (0, 26)))
    (x_high, x_low), (w_high, w_low) = halves(padded_x), halves(padded_weight)
    for block in range(0, 96, 32):
        for left, right in ((x_high, w_high), (x_low, w_high), (x_high, w_low)):
            even, odd = np.zeros((5, 9), np.float32), np.zeros((5, 9), np.float32)
            for k in range(block, block + 32, 2):
                even = fused(left[:, k, None], right[:, k], even)
                odd = fused(left[:, k + 1, None], right[:, k + 1], odd)
            expected = expected + (even + odd)
    layer = new_linear(70, 9, False, torch.float32)
    layer.weight.copy_(torch.from_numpy(weight))
    for context in contexts():
        np.testing.assert_array_equal(packed(layer, context, "tiles")(torch.from_numpy(x)).numpy(), expected)


@torch.inference_mode()
def test_tiles_are_a_hundred_times_as_exact_as_bfloat16() -> None:
    torch.manual_seed(1)
    layer, x = new_linear(896, 256, False, torch.float32), torch.randn(40, 896)
    exact = functional.linear(x.double(), layer.weight.double())
    error = (packed(layer, contexts()[-1], "tiles")(x) - exact).abs().max() / exact.abs().max()
    rounded = functional.linear(x.bfloat16().double(), layer.weight.bfloat16().double())
    assert error < 1e-5
    assert 100 * error < (rounded - exact).abs().max() / exact.abs().max()


def test_tiny_numbers_count_as_zero_in_tiles() -> None:
    layer, x = new_linear(32, 16, False, torch.float32), torch.full((2, 32), 1e-39)
    with torch.inference_mode():
        for context in contexts():
            assert not packed(layer, context, "tiles")(x).any()


def test_packed_layers_follow_weights_that_change_in_place() -> None:
    """Also where another engine, or none, asked for the change: the layer itself looks."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))
    plain = copy.deepcopy(model)
    for num_threads in (2, 1):  # the second finds the layers replaced
        NativeKernels("test", num_threads).adopt(model)
    x = torch.randn(3, 6)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x))
    for one in (model, plain):
        with torch.no_grad():
            one[0].weight.mul_(2.0)
            one[0].bias.add_(1.0)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x))


def test_gradients_go_through_torch() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(2, 4, requires_grad=True)
    got = packed(layer, contexts()[0])(x)
    assert torch.equal(got, functional.linear(x, layer.weight, layer.bias))
    got.sum().backward()
    assert x.grad is not None


def test_other_linear_classes_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(input)

    model = nn.Sequential(Scaled(3, 3), nn.Linear(3, 3))
    assert pack_linears(model, new_packed, contexts()[0]) == [model[1]]


def test_weights_of_another_shape_are_refused() -> None:
    layer = _native.PackedLinear(4, 3)
    with pytest.raises(ValueError, match=r"weight must be \[n, k\]"):
        layer.pack(as_numpy(torch.zeros(3, 4)), None)
    with pytest.raises(ValueError, match=r"bias must be \[n\]"):
        layer.pack(as_numpy(torch.zeros(4, 3)), as_numpy(torch.zeros(3)))


def test_a_context_says_what_it_is_and_refuses_what_it_cannot_be() -> None:
    assert _native.Context(3).num_threads == 3
    with pytest.raises(ValueError, match="isa is 'sse'; allowed: auto, plain, avx2, avx512"):
        _native.Context(1, isa="sse")
    with pytest.raises(ValueError, match="num_threads must be 1 to 1024"):
        _native.Context(0)


# ---- norms and gates


class RmsNorm(nn.Module):
    def __init__(self, dim: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        self.variance_epsilon, self.offset = 1e-6, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.rms_norm(x, self.weight + self.offset, self.variance_epsilon)


class Gated(nn.Module):
    def __init__(self, hidden: int, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down_proj, self.scale = nn.Linear(width, hidden, bias=False), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.scale * functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("dim", [1, 7, 16, 32, 131, 896])
@torch.inference_mode()
def test_norm_equals_its_twin_in_the_same_bits_everywhere(dim: int) -> None:
    torch.manual_seed(dim)
    layer, x = RmsNorm(dim), 10.0 * torch.randn(300, dim)
    expected, outputs = layer(x), []
    for context in contexts():
        out = torch.empty_like(x)
        _native.rms_norm(x.data_ptr(), layer.weight.data_ptr(), 300, dim, 1e-6, out.data_ptr(), context)
        outputs.append(out)
    torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100_003])
@torch.inference_mode()
def test_gate_equals_its_twin_in_the_same_bits_everywhere(size: int) -> None:
    torch.manual_seed(size)
    gate, up = 30.0 * torch.randn(size), torch.randn(size)
    gate[0] = -200.0  # exp of it is beyond float32
    outputs = []
    for context in contexts():
        out = torch.empty_like(gate)
        _native.silu_mul(gate.data_ptr(), up.data_ptr(), out.data_ptr(), size, context)
        outputs.append(out)
    torch.testing.assert_close(outputs[0], reference.silu_mul(gate, up), atol=1e-6, rtol=1e-5)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("products", PRODUCTS)
@torch.inference_mode()
def test_a_gate_with_its_products_has_the_bits_of_the_parts(bias: bool, products: Products) -> None:
    torch.manual_seed(2)
    gate, up = new_linear(70, 197, bias, torch.float32), new_linear(70, 197, bias, torch.float32)
    x = 3.0 * torch.randn(110, 70)
    for context in contexts():
        parts = [packed(layer, context, products) for layer in (gate, up)]
        left, right = (part(x) for part in parts)
        _native.silu_mul(left.data_ptr(), right.data_ptr(), left.data_ptr(), left.numel(), context)
        for rows in (1, 4, 13, 110):
            out, scratch = torch.empty(rows, 197), torch.empty(rows, 197)
            places = x.data_ptr(), rows, scratch.data_ptr(), out.data_ptr()
            _native.gated_linear(*(part.packed() for part in parts), *places, context)
            assert torch.equal(out, left[:rows]), rows
    other = packed(new_linear(70, 196, bias, torch.float32), contexts()[0], products)
    with pytest.raises(ValueError, match="gate and up must have one size"):
        _native.gated_linear(parts[0].packed(), other.packed(), 0, 0, 0, 0, contexts()[0])


def test_only_layers_that_compute_the_same_are_taken_over() -> None:
    model = nn.ModuleList(
        [RmsNorm(8), RmsNorm(8, offset=1.0), nn.LayerNorm(8), Gated(8, 12), Gated(8, 12, scale=0.5), nn.Linear(8, 8)]
    )
    assert adopt_layers(model, _native, contexts()[0]) == [model[0], model[3]]
    assert adopt_layers(model, _native, contexts()[0]) == []


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_model_taken_over_computes_what_it_did(products: Products) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(RmsNorm(24), Gated(24, 40), RmsNorm(24, offset=1.0), nn.Linear(24, 9))
    plain = copy.deepcopy(model)
    NativeKernels("test", num_threads=2, products=products).adopt(model)
    x = torch.randn(2, 5, 24)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if products == "fma" else {"atol": 3e-4, "rtol": 1e-4}
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), **tolerance)
        model[1].up_proj.weight.mul_(3.0)  # the gate looks, too, whether weights have changed
        plain[1].up_proj.weight.mul_(3.0)
        torch.testing.assert_close(model(x), plain(x), **tolerance)
    assert ["forward" in layer.__dict__ for layer in model] == [True, True, False, True]
    assert torch.equal(model(x), plain(x))  # with gradients: torch's own operations


def test_torch_keeps_its_threads_where_it_computes_products_itself() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(2, 3, 4))

    kernels = NativeKernels("test")
    kernels.adopt(nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    assert kernels.own_threads
    kernels.adopt(nn.Sequential(nn.Linear(4, 3), Experts()))
    assert not kernels.own_threads


def test_a_pass_gives_torch_its_threads_back() -> None:
    before = torch.get_num_threads()
    with one_torch_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

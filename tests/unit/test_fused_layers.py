"""Norms and gates in one launch each: only layers whose formula is theirs, and the model computes what it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.triton_interpreter import DEVICE  # isort: skip

from slipstream.kernels import reference
from slipstream.kernels.fused_layers import FusedGate, FusedNorm, adopt_fused
from slipstream.kernels.recognise import is_silu_gate, norm_formula
from slipstream.kernels.triton.silu_mul import silu_mul
from tests.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul_equals_its_twin(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (4 * torch.randn(2, 3, 7, 90)).to(DEVICE, dtype)
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(silu_mul(gate, up), reference.silu_mul(gate, up), atol=bound, rtol=bound)
    with pytest.raises(ValueError, match=r"up is torch.* \[2, 7, 90\]; allowed: .*\[3, 7, 90\], as gate"):
        silu_mul(gate, up[:2])


# Layers, each with two norms and a gate at least, and a last norm; gemma's gate is a GELU, mixtral's are experts.
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_did(family: str) -> None:
    model, ids = tiny_model(family).to(DEVICE), torch.arange(5, 10, device=DEVICE)[None]
    with torch.inference_mode():
        expected = model(ids).logits
    found = adopt_fused(model)
    norms = sum(isinstance(layer.forward, FusedNorm) for layer in found)
    gates = sum(isinstance(layer.forward, FusedGate) for layer in found)
    assert norms >= 5
    assert gates == (2 if family in ("qwen3", "llama") else 0)
    assert adopt_fused(model) == []
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-4)


def test_weights_copied_in_place_take_effect_and_gradients_flow() -> None:
    model = tiny_model("llama").to(DEVICE)
    norm = model.model.norm
    adopt_fused(model)
    x = torch.randn(2, 48, device=DEVICE)
    with torch.inference_mode():
        before = norm(x)
    with torch.no_grad():
        norm.weight.mul_(2.0)
    with torch.inference_mode():
        torch.testing.assert_close(norm(x), 2 * before)
    norm(x).sum().backward()
    assert norm.weight.grad is not None


def test_formulas_are_told_apart() -> None:
    families = {"llama": (False, True), "gemma3": (True, False)}
    for family, (unit_offset, round_first) in families.items():
        norm = tiny_model(family).to(torch.bfloat16).model.norm
        nn.init.normal_(norm.weight, 1.0, 0.5)
        assert norm_formula(norm) == (1e-6, unit_offset, round_first)
    assert norm_formula(nn.LayerNorm(8)) is None
    assert norm_formula(nn.Linear(8, 8, bias=False)) is None
    assert not is_silu_gate(tiny_model("gemma3").model.layers[0].mlp)

"""RMS norms and gated SiLU layers of a model in one Triton launch each: a pass has a third fewer kernels.

Invariants
- A layer is taken over only if it is recognised (see recognise.py).
- Weights are read where the model keeps them, at each call: weights copied in place take effect, also under a graph.
- Where gradients are wanted the layer computes as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.kernels.linear import rms_norm
from slipstream.kernels.recognise import NormFormula, is_silu_gate, norm_formula, unreplaced


class FusedNorm:
    """Stands in for the forward of an RMS norm."""

    def __init__(self, layer: nn.Module, formula: NormFormula) -> None:
        self._plain: Callable[[Tensor], Tensor] = layer.forward
        self._layer: Any = layer
        self._formula = formula

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., D]."""
        if torch.is_grad_enabled() or x.dtype != self._layer.weight.dtype:
            return self._plain(x)
        return rms_norm(x, self._layer.weight, *self._formula, backend="triton")


class FusedGate:
    """Stands in for the forward of a feed-forward layer down(silu(gate(x)) * up(x))."""

    def __init__(self, layer: Any) -> None:
        self._plain: Callable[[Tensor], Tensor] = layer.forward
        self._gate, self._up, self._down = layer.gate_proj, layer.up_proj, layer.down_proj

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        if torch.is_grad_enabled():
            return self._plain(x)
        from slipstream.kernels.triton.silu_mul import silu_mul

        down: Tensor = self._down(silu_mul(self._gate(x), self._up(x)))
        return down


def adopt_fused(model: nn.Module) -> list[nn.Module]:
    """Replaces the forwards of the layers found, those replaced before left alone; the layers."""
    found: list[nn.Module] = []
    for layer in unreplaced(model):
        if formula := norm_formula(layer):
            layer.forward = FusedNorm(layer, formula)
        elif is_silu_gate(layer):
            layer.forward = FusedGate(layer)
        else:
            continue
        found.append(layer)
    return found

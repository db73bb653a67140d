"""RMS norms and gated SiLU layers of a model in one native call each. Twins: reference.rms_norm, reference.silu_mul;
a gated layer takes its two products along where they are packed.

Invariants
- A layer is taken over only if it is recognised (see recognise.py).
- Weights are read where the model keeps them: there is no copy to keep up.
- Where gradients are wanted, or the dtype is not float32, the layer computes as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from slipstream.kernels.packed_linear import PackedLinear
from slipstream.kernels.recognise import is_silu_gate, norm_formula, unreplaced


class NativeNorm:
    """Stands in for the forward of an RMS norm."""

    def __init__(self, layer: nn.Module, epsilon: float, native: Any, context: Any) -> None:
        self.epsilon, self._native, self._context = epsilon, native, context
        self._plain: Callable[[torch.Tensor], torch.Tensor] = layer.forward
        self._weight: Any = layer.weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., dim]."""
        if torch.is_grad_enabled() or x.dtype != torch.float32:
            return self._plain(x)
        x = x.contiguous()
        out, dim = torch.empty_like(x), x.shape[-1]
        self._native.rms_norm(
            x.data_ptr(), self._weight.data_ptr(), x.numel() // dim, dim, self.epsilon, out.data_ptr(), self._context
        )
        return out


class NativeGate:
    """Stands in for the forward of a feed-forward layer down(silu(gate(x)) * up(x))."""

    def __init__(self, layer: nn.Module, native: Any, context: Any) -> None:
        self._native, self._context = native, context
        self._plain: Callable[[torch.Tensor], torch.Tensor] = layer.forward
        parts: Any = layer
        self._gate, self._up, self._down = parts.gate_proj, parts.up_proj, parts.down_proj

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden]."""
        if torch.is_grad_enabled() or x.dtype != torch.float32:
            return self._plain(x)
        both = self._gate.forward, self._up.forward
        if isinstance(both[0], PackedLinear) and isinstance(both[1], PackedLinear):
            down: torch.Tensor = self._down(self._gated(x.contiguous(), both[0], both[1]))
            return down
        gate, up = self._gate(x).contiguous(), self._up(x).contiguous()
        self._native.silu_mul(gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.numel(), self._context)
        down = self._down(gate)
        return down

    def _gated(self, x: torch.Tensor, gate: PackedLinear, up: PackedLinear) -> torch.Tensor:
        layers = gate.packed(), up.packed()
        width = self._gate.out_features
        out, scratch = x.new_empty((*x.shape[:-1], width)), x.new_empty((*x.shape[:-1], width))
        places = x.data_ptr(), x.numel() // x.shape[-1], scratch.data_ptr(), out.data_ptr()
        self._native.gated_linear(*layers, *places, self._context)
        return out


def adopt_layers(model: nn.Module, native: Any, context: Any) -> list[nn.Module]:
    """Replaces the forwards of the float32 layers found, those replaced before left alone; the layers."""
    found: list[nn.Module] = []
    for layer in unreplaced(model):
        formula = norm_formula(layer)
        # A weight that is added to one is left to the model.
        if formula is not None and not formula[1] and layer.weight.dtype == torch.float32:
            layer.forward = NativeNorm(layer, formula[0], native, context)
        elif is_silu_gate(layer):
            layer.forward = NativeGate(layer, native, context)
        else:
            continue
        found.append(layer)
    return found

"""RMS norms and gated SiLU layers of a model in one native call each. Twins: reference.rms_norm, reference.silu_mul.

Invariants
- A layer is taken over only if it computes what the twin computes, which is tried on random numbers: models name their
  layers alike and yet differ (a weight that is added to one, another epsilon).
- Weights are read where the model keeps them: there is no copy to keep up.
- Where gradients are wanted, or the dtype is not float32, the layer computes as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from slipstream.kernels import reference

TOLERANCE = 1e-5


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
        gate, up = self._gate(x).contiguous(), self._up(x).contiguous()
        self._native.silu_mul(gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.numel(), self._context)
        down: torch.Tensor = self._down(gate)
        return down


def _epsilon(layer: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(layer, name, None)
        if isinstance(value, float):
            return value
    return None


@torch.inference_mode()
def _computes(layer: nn.Module, twin: Callable[[torch.Tensor], torch.Tensor], width: int) -> bool:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    try:
        return torch.allclose(layer(x), twin(x), rtol=TOLERANCE, atol=TOLERANCE)
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return False  # it wants other arguments or shapes: not the layer that it looks like


def unreplaced(model: nn.Module) -> Iterator[nn.Module]:
    """The model's layers whose forward is still their class's."""
    return (layer for layer in model.modules() if "forward" not in vars(layer))


def find_norms(model: nn.Module) -> list[tuple[nn.Module, float]]:
    """The model's RMS norms with their epsilon."""
    found = []
    for layer in unreplaced(model):
        parameters = dict(layer.named_parameters())
        weight, epsilon = parameters.get("weight"), _epsilon(layer)
        if list(parameters) != ["weight"] or weight is None or weight.dim() != 1 or epsilon is None:
            continue
        # Bound now: the loop's variables move on.
        if _computes(layer, lambda x, w=weight, e=epsilon: reference.rms_norm(x, w, e), len(weight)):  # type: ignore[misc]
            found.append((layer, epsilon))
    return found


def find_gates(model: nn.Module) -> list[nn.Module]:
    """The model's gated SiLU feed-forward layers."""
    found = []
    for layer in unreplaced(model):
        gate, up, down = (getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
        if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
            continue

        def twin(x: torch.Tensor, gate: nn.Module = gate, up: nn.Module = up, down: nn.Module = down) -> torch.Tensor:
            out: torch.Tensor = down(reference.silu_mul(gate(x), up(x)))
            return out

        if _computes(layer, twin, gate.in_features):
            found.append(layer)
    return found


def adopt_layers(model: nn.Module, native: Any, context: Any) -> list[nn.Module]:
    """Replaces the forwards of the layers found; the layers."""
    norms, gates = find_norms(model), find_gates(model)
    for layer, epsilon in norms:
        layer.forward = NativeNorm(layer, epsilon, native, context)
    for layer in gates:
        layer.forward = NativeGate(layer, native, context)
    return [layer for layer, _ in norms] + gates

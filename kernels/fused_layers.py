"""RMS norms and gated SiLU layers of a model in one Triton launch each: a pass has a third fewer kernels.

Invariants
- A layer is taken over only if its formula reproduces the layer's own output on random numbers, never by its name:
  models name their layers alike and yet differ.
- Weights are read where the model keeps them, at each call: weights copied in place take effect, also under a graph.
- Where gradients are wanted the layer computes as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.kernels import reference
from slipstream.kernels.linear import rms_norm

NormFormula = tuple[float, bool, bool]


@torch.no_grad()
def norm_formula(layer: Any) -> NormFormula | None:
    """(eps, unit_offset, round_first) of kernels.linear.rms_norm for this layer; None: it is no RMS norm we know."""
    parameters = dict(layer.named_parameters())
    weight, eps = parameters.get("weight"), getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    if list(parameters) != ["weight"] or weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = _random(16, len(weight), weight)
    wanted = _output(layer, x)
    if wanted is None or wanted.shape != x.shape:
        return None
    errors = {
        formula: float((reference.rms_norm(x, weight, eps, *formula).float() - wanted).abs().mean())
        for formula in itertools.product((False, True), (True, False))
    }
    best = min(errors, key=errors.__getitem__)
    return (eps, *best) if _close(errors[best], wanted, weight.dtype) else None


def is_silu_gate(layer: Any) -> bool:
    """Whether the layer computes down(silu(gate(x)) * up(x))."""
    gate, up, down = (getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
        return False
    x = _random(4, gate.in_features, gate.weight)
    wanted = _output(layer, x)
    if wanted is None:
        return False
    with torch.no_grad():
        got = down(reference.silu_mul(gate(x), up(x))).float()
    return got.shape == wanted.shape and _close(float((got - wanted).abs().mean()), wanted, gate.weight.dtype)


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
    for layer in model.modules():
        if "forward" in vars(layer):
            continue
        if formula := norm_formula(layer):
            layer.forward = FusedNorm(layer, formula)
        elif is_silu_gate(layer):
            layer.forward = FusedGate(layer)
        else:
            continue
        found.append(layer)
    return found


def _random(rows: int, width: int, like: Tensor) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


@torch.no_grad()
def _output(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What the layer makes of x, in float32; None where it wants other arguments or shapes."""
    try:
        return layer(x).float()
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return None


def _close(error: float, wanted: Tensor, dtype: torch.dtype) -> bool:
    """A right formula differs by a rounding here and there; NaN is never close."""
    return error <= torch.finfo(dtype).eps * (float(wanted.abs().mean()) + 1e-6)

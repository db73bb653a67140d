"""Which layers of a model compute a formula that a kernel knows.

Invariant: a layer is recognised only if the formula reproduces its own output on random numbers, never by its name:
models name their layers alike and yet differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slipstream.kernels import reference

NormFormula = tuple[float, bool, bool]


def unreplaced(model: nn.Module) -> Iterator[nn.Module]:
    """The model's layers whose forward is still their class's."""
    return (layer for layer in model.modules() if "forward" not in vars(layer))


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

"""engine.batch_invariant: a model whose layers give a token the same bits in any batch and with any draft.

Invariants
- Every layer that sums over a width is replaced by one with a fixed order, or the model is refused by the name of the
  layer that could not be; elementwise layers, lookups and torch's layer norm (one block a row) are left as they are.
- Replaced layers read their module's weights at each call: weights copied in place take effect.
- A norm's formula is read off the module's own output, never guessed from its name alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from slipstream.kernels.dispatch import Backend, KernelSet
from slipstream.kernels.linear import linear, rms_norm
from slipstream.kernels.recognise import norm_formula
from slipstream.rollout.engine import EngineError

LEFT_ALONE = (nn.Embedding, nn.LayerNorm)


def make_invariant(model: nn.Module, kernels: KernelSet, dtype: torch.dtype) -> None:
    """Replaces the forward passes of linear layers and RMS norms of `model` in place.

    C++ kernels have replaced what they compute: see kernels/native_set.py. Raises EngineError where the promise cannot
    be kept: other kernels of the CPU, and layers with weights of their own that are neither.
    """
    if kernels.name == "native":
        for name, module in model.named_modules():
            if "forward" not in vars(module):
                refuse_sums(name, module)
        return
    if not kernels.on_device:
        raise EngineError(
            f"engine.batch_invariant=true with {kernels.name} kernels in {dtype}; allowed: triton or native kernels"
        )
    for name, module in model.named_modules():
        replace(name, module, "triton")


def replace(name: str, module: nn.Module, backend: Backend) -> None:
    """Gives one module a forward pass of fixed order, where it needs one."""
    forward: Any
    if type(module) is nn.Linear:
        forward = partial(_linear_forward, module, backend)
    elif type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), torch.Tensor):
        formula = norm_formula(module)
        if formula is None:
            raise EngineError(
                f"engine.batch_invariant=true: norm {name} ({type(module).__name__}) is no RMS norm we know"
            )
        forward = partial(_norm_forward, module, backend, *formula)
    else:
        refuse_sums(name, module)
        return
    module.forward = forward


def refuse_sums(name: str, module: nn.Module) -> None:
    """EngineError for a layer that sums over a width of its own weights."""
    wide = [key for key, tensor in module.named_parameters(recurse=False) if tensor.dim() >= 2]
    if wide and not isinstance(module, LEFT_ALONE):
        raise EngineError(
            f"engine.batch_invariant=true: layer {name} ({type(module).__name__}) sums over {wide[0]!r} in an "
            "order of its own; allowed: models of linear layers, embeddings and norms"
        )


def _linear_forward(module: nn.Linear, backend: Backend, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias, backend)


def _norm_forward(
    module: Any, backend: Backend, eps: float, unit_offset: bool, round_first: bool, x: torch.Tensor
) -> torch.Tensor:
    return rms_norm(x, module.weight, eps, unit_offset, round_first, backend)

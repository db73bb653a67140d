"""Linear layers whose rows do not know each other: the weights packed for the native kernel, and the plain twin.

Invariants
- A row of the output has the same bits whatever rows come with it: every output is one chain of fused multiply-adds
  over the inputs in order, in float32.
- The packed copy follows the model's own weights: `refresh` packs anew what was changed in place since the last pass.
- Where gradients are wanted the layer computes as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def reference_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The plain twin: x [rows, k], weight [n, k], bias [n]; [rows, n] of x's dtype, computed in float64."""
    out = x.double() @ weight.double().T
    return (out if bias is None else out + bias.double()).to(x.dtype)


def as_numpy(tensor: torch.Tensor) -> Any:
    """The tensor's memory as an array; bfloat16, which numpy lacks, as int16 of the same bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class PackedLinear:
    """Stands in for the forward of one nn.Linear on the CPU. pack: a native PackedLinear of the layer's dtype."""

    def __init__(self, layer: nn.Linear, packed: Any, context: Any) -> None:
        # The layer's own tensors: reading them through the module costs more than the smallest of these products.
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self._n, self._k, self._dtype = layer.out_features, layer.in_features, layer.weight.dtype
        self._packed, self._context = packed, context

    def pack(self) -> None:
        """Copies the weights as they are now."""
        bias = None if self.bias is None else as_numpy(self.bias.detach().contiguous())
        self._packed.pack(as_numpy(self.weight.detach().contiguous()), bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., k] of the layer's dtype; [..., n]."""
        if torch.is_grad_enabled() or x.dtype != self._dtype:
            return functional.linear(x, self.weight, self.bias)
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], self._n), dtype=self._dtype)
        self._packed.forward(x.data_ptr(), x.numel() // self._k, out.data_ptr(), self._context)
        return out


class PackedLinears:
    """All plain linear layers of a model, packed in place."""

    def __init__(self, model: nn.Module, make: Callable[[nn.Linear], Any], context: Any) -> None:
        # Subclasses may compute something else: only nn.Linear itself is known.
        found = [module for module in model.modules() if type(module) is nn.Linear]
        self.layers = [PackedLinear(layer, make(layer), context) for layer in found]
        self._sources = [[t for t in (packed.weight, packed.bias) if t is not None] for packed in self.layers]
        self._seen: list[list[int]] = [[] for _ in self.layers]
        self.refresh()
        for packed in self.layers:
            packed.layer.forward = packed  # type: ignore[method-assign, assignment]

    def refresh(self) -> int:
        """Packs what has changed in place since the last call; the number of layers."""
        now = [[tensor._version for tensor in tensors] for tensors in self._sources]
        if now == self._seen:
            return 0
        changed = [i for i, versions in enumerate(now) if versions != self._seen[i]]
        for i in changed:
            self.layers[i].pack()
        self._seen = now
        return len(changed)

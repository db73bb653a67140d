"""Linear layers whose rows do not know each other: the weights packed for a native kernel. Twin: reference.linear.

Invariants
- A row of the output has the same bits whatever rows come with it: every output is one chain of fused multiply-adds
  over the inputs in order, in float32 (csrc/linear.h), or a sum of tiles of a fixed depth (csrc/tiles.h).
- The packed copy follows the model's own weights: a call packs anew what was changed in place since the last one. What
  is written through `.data`, which torch does not count, is not seen.
- Where gradients are wanted the layer computes as torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def as_numpy(tensor: torch.Tensor) -> Any:
    """The tensor's memory as an array; bfloat16, which numpy lacks, as int16 of the same bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class PackedLinear:
    """Stands in for the forward of one nn.Linear on the CPU. packed: a native PackedLinear or
    TiledLinear of the layer's dtype."""

    def __init__(self, layer: nn.Linear, packed: Any, context: Any) -> None:
        # The layer's own tensors: reading them through the module costs more than the smallest of these products.
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self._n, self._k, self._dtype = layer.out_features, layer.in_features, layer.weight.dtype
        self._packed, self._context = packed, context
        self._seen: tuple[int, int] | None = None

    def _pack(self, seen: tuple[int, int]) -> None:
        bias = None if self.bias is None else as_numpy(self.bias.detach().contiguous())
        self._packed.pack(as_numpy(self.weight.detach().contiguous()), bias)
        self._seen = seen

    def packed(self) -> Any:
        """The native layer with the weights as they are now."""
        seen = self.weight._version, 0 if self.bias is None else self.bias._version
        if seen != self._seen:
            self._pack(seen)
        return self._packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., k] of the layer's dtype; [..., n]."""
        if torch.is_grad_enabled() or x.dtype != self._dtype:
            return functional.linear(x, self.weight, self.bias)
        packed = self.packed()
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], self._n), dtype=self._dtype)
        packed.forward(x.data_ptr(), x.numel() // self._k, out.data_ptr(), self._context)
        return out


def pack_linears(model: nn.Module, make: Callable[[nn.Linear], Any], context: Any) -> list[nn.Linear]:
    """Replaces the forwards of the model's plain linear layers; the layers. make: an empty native layer.

    Left alone: subclasses of nn.Linear, which may compute something else; layers that have been replaced before; and
    tensors made under inference_mode, whose changes torch does not count.
    """
    plain = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    found = [layer for layer in plain if not layer.weight.is_inference()]
    for layer in found:
        layer.forward = PackedLinear(layer, make(layer), context)  # type: ignore[method-assign, assignment]
    return found

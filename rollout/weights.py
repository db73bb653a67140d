"""The policy's weights as the engine serves them: replaced in place, so that whatever points at them stays right.

Invariants: a tensor keeps its address for the engine's life (CUDA graphs read it there); weights that do not fit are
refused before the first one is copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slipstream.rollout.engine import EngineError


class WeightTable:
    """The parameters and buffers of one model by name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = dict(model.state_dict(keep_vars=True))

    def copy_from(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Copies the weights in place. Raises EngineError naming a missing, unknown or misshapen tensor."""
        unknown = sorted(set(weights) - set(self._tensors))
        if unknown:
            raise EngineError(f"weights of version {version} hold {unknown[0]!r}, which the model does not have")
        tied = {id(self._tensors[name]) for name in weights}
        missing = sorted(name for name, tensor in self._tensors.items() if id(tensor) not in tied)
        if missing:
            raise EngineError(f"weights of version {version} lack {missing[0]!r}")
        for name, tensor in weights.items():
            if tensor.shape != self._tensors[name].shape:
                raise EngineError(
                    f"weights of version {version}: {name!r} is {tuple(tensor.shape)}, "
                    f"the model has {tuple(self._tensors[name].shape)}"
                )
        with torch.no_grad():
            for name, tensor in weights.items():
                self._tensors[name].copy_(tensor)

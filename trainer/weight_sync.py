"""Moves the policy's weights from the learner to the workers under one version number.

Invariants: tied tensors travel once; what arrives has the dtype and the bits that were sent. One object in the Ray
store, mapped by the workers of a node without a copy of their own until they write it into their model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def export_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors by name on the CPU, one name per tied group."""
    seen: set[int] = set()
    out: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor.detach().to("cpu", copy=True)
    return out


def num_bytes(weights: Mapping[str, torch.Tensor]) -> int:
    """Bytes that travel."""
    return sum(tensor.nbytes for tensor in weights.values())

"""Weights in Ray's object store: put once, mapped by every worker of a node without a copy.

Invariants: one object a frame, whose arrays the store holds out of band, 64-byte aligned; whoever holds one of the
arrays keeps the object's memory from being used again; nobody can write to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
import torch
from ray.exceptions import RayError

from slipstream.rollout.weight_handle import Arrays, WeightError, as_bytes, mapped_tensor


@dataclass(frozen=True)
class StorePayload:
    """ref: of a dictionary of uint8 arrays."""

    ref: Any
    same_pages: ClassVar[bool] = True
    adoptable: ClassVar[bool] = True

    def receive(self, timeout_s: float) -> Arrays:
        """The arrays, in the memory of this node's store."""
        try:
            arrays = ray.get(self.ref, timeout=timeout_s)
        except RayError as error:
            reason = " ".join(str(error).split())[:300]
            raise WeightError(f"weights in Ray's object store: {type(error).__name__}: {reason}") from error
        return {key: mapped_tensor(array) for key, array in arrays.items()}


def put_tensors(tensors: Mapping[str, torch.Tensor]) -> StorePayload:
    """Copies CPU tensors into the store, once."""
    return StorePayload(ray.put({key: as_bytes(tensor).numpy() for key, tensor in tensors.items()}))

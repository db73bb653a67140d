"""The Triton kernels as the engine's kernel set: one layout, one step table, sampling on the device.

Invariants
- The cache of a layer is keys and values [slots, Hkv, L, D], equal in shape and dtype.
- `attention` reads the step's StepTable; tokens outside every request give zero rows.
- Nothing here waits for the device but `sample_verify`, which a step over static buffers does not call.
"""

from __future__ import annotations

import numpy as np
import torch

from slipstream.kernels.cache_layout import LayerCache, StepPlaces
from slipstream.kernels.fused_layers import adopt_fused
from slipstream.kernels.reference import SamplingRows, Verified
from slipstream.kernels.triton import append_kv as cache_ops
from slipstream.kernels.triton import sample_verify as sampler
from slipstream.kernels.triton.step_table import step_attention


class TritonKernels:
    """On CUDA, or on the CPU through Triton's interpreter; float32, bfloat16 and float16."""

    name = "triton"
    products = "triton"
    on_device = True
    trees = False
    shares_prefixes = True
    own_threads = False

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def adopt(self, model: torch.nn.Module) -> None:
        """Norms and gates in one launch each. Through the interpreter, where a launch is what costs, none."""
        if next(model.parameters()).is_cuda:
            adopt_fused(model)

    def new_layer_cache(
        self, num_slots: int, length: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> LayerCache:
        """Zeroed keys and values [num_slots, Hkv, length, D]; ValueError where the two differ in shape or dtype."""
        keys, values = (
            states.new_zeros(num_slots, states.shape[1], length, states.shape[3])
            for states in (key_states, value_states)
        )
        cache_ops.check_cache(keys, values)
        return keys, values

    def snapshot(self, keys: torch.Tensor, values: torch.Tensor, slot: int, length: int) -> LayerCache:
        """A copy of the first `length` positions of a slot."""
        return keys[slot, :, :length].clone(), values[slot, :, :length].clone()

    def restore(self, keys: torch.Tensor, values: torch.Tensor, slot: int, saved: LayerCache) -> None:
        """Writes a snapshot to the start of a slot."""
        keys[slot, :, : saved[0].shape[1]] = saved[0]
        values[slot, :, : saved[1].shape[1]] = saved[1]

    def copy_prefix(self, keys: torch.Tensor, values: torch.Tensor, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another, and nothing else."""
        keys[target, :, :length] = keys[source, :, :length]
        values[target, :, :length] = values[source, :, :length]

    def append_kv(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Writes the new tokens into the cache in place; places outside the cache are left out."""
        if new_keys.stride(2) != 1 or new_values.stride(2) != 1:
            new_keys, new_values = new_keys.contiguous(), new_values.contiguous()
        cache_ops.append_kv(keys, values, new_keys, new_values, slots, positions)

    def move_kv(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
    ) -> None:
        """Moves tokens to other places of their slots."""
        keys[slots, :, target] = keys[slots, :, source]
        values[slots, :, target] = values[slots, :, source]

    def attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        places: StepPlaces,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """Attention of the step's tokens, [T, H, D]; places.table is the step's StepTable."""
        return step_attention(query, keys, values, places.table, scale, window, softcap)

    def sample_verify(
        self,
        logits: torch.Tensor,
        offsets: np.ndarray,
        drafts: np.ndarray,
        rows: SamplingRows,
        parents: np.ndarray | None = None,
    ) -> Verified:
        """Samples and verifies chains where the logits are, then waits for the result. Raises ValueError for trees."""
        if parents is not None:
            raise ValueError("the Triton sampler verifies chains, and was given a tree")
        device = logits.device
        tables = torch.from_numpy(offsets).to(device), torch.from_numpy(drafts).to(device)
        return sampler.sample_verify(logits, *tables, sampler.device_rows(rows, device)).to_host()

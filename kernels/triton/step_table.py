"""One step's requests in buffers that stay where they are, so that a CUDA graph can read them again and again.

Invariants
- Every shape, launch grid and scratch size follows from the table's capacities; no value is read back.
- Padding is inert: a work item or token of request -1 is left out, and the output rows of such tokens are zero.
- The numbers are trusted: the packer (rollout/static_step.py) makes them from the engine's own table.
- Drafts are chains or trees as the ancestor masks say; the splits serve every sliding window, because a split whose
  keys are all hidden has weight exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import triton

from slipstream.kernels.triton.append_kv import Schedule
from slipstream.kernels.triton.verify_attention import launch, tile_shape


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """slot, context_len, prefix_slot, prefix_len: [B]; query_offsets: [B + 1]; ancestors, depth, token_request: [T];
    work: [N, 4] and spans: [B, 3] as in split_plan.SplitPlan, all int32 on the device. width: the widest request that
    the table holds; scratch_tokens: capacity for query tokens times splits; batch_invariant as in verify_attention.
    """

    slot: torch.Tensor
    context_len: torch.Tensor
    prefix_slot: torch.Tensor
    prefix_len: torch.Tensor
    query_offsets: torch.Tensor
    ancestors: torch.Tensor
    depth: torch.Tensor
    token_request: torch.Tensor
    work: torch.Tensor
    spans: torch.Tensor
    width: int
    scratch_tokens: int
    batch_invariant: bool


def step_table(views: Mapping[str, torch.Tensor], width: int, scratch_tokens: int, batch_invariant: bool) -> StepTable:
    """A table whose tensors are those of `views` with the same names."""
    tensors = {f.name: views[f.name] for f in fields(StepTable) if f.name in views}
    return StepTable(**tensors, width=width, scratch_tokens=scratch_tokens, batch_invariant=batch_invariant)


def tiles_of(dtype: torch.dtype, head_dim: int, group: int, width: int, batch_invariant: bool) -> tuple[int, int]:
    """(rows of a tile, tiles) for requests of up to `width` query tokens, `group` query heads a key-value head."""
    block_m, widest, _ = tile_shape(dtype, head_dim)
    if not batch_invariant:
        block_m = min(max(triton.next_power_of_2(group * width), 16), widest)
    return block_m, -(-group * width // block_m)


def step_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: StepTable,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """verify_attention over a StepTable: [T, Hq, D], zero where token_request is -1. Nothing waits for the device."""
    query = query.contiguous()
    out = torch.zeros_like(query)
    group, dim = query.shape[1] // keys.shape[1], query.shape[2]
    block_m, tiles = tiles_of(query.dtype, dim, group, table.width, table.batch_invariant)
    plan = Schedule(table.work, table.spans, table.scratch_tokens, single=False)
    launch(query, keys, values, out, table, plan, scale, window, softcap, block_m, tiles)
    return out

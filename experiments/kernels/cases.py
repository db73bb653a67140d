"""Inputs that several kernels of the bench share: random rows to sample, a cache with a step's table, positions.

Invariant: everything is seeded and random; no kernel is checked or timed on zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from slipstream.kernels.reference import SamplingRows
from slipstream.rollout.packing import StepPlan
from slipstream.rollout.static_step import SplitPolicy, bucket_bytes, bucket_views, make_step


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of an attention layer."""

    query: int
    key_value: int
    dim: int

    @property
    def row_bytes(self) -> int:
        """Numbers of one position's keys and values."""
        return 2 * self.key_value * self.dim


TOY, SMALL, LARGE = Heads(4, 2, 32), Heads(14, 2, 64), Heads(32, 8, 128)
"""For errors; of a 0.5 B and of an 8 B model."""


def sampling_rows(num_requests: int, filtered: bool = False) -> SamplingRows:
    """Requests at temperature 1, far from their end; filtered: half of them with top-k 50 and top-p 0.9."""
    half = np.arange(num_requests) % 2 == 1
    return SamplingRows(
        seed=np.full(num_requests, 7, np.uint64),
        uid=np.arange(num_requests, dtype=np.uint64) << np.uint64(33),
        position=np.arange(num_requests, dtype=np.int32),
        temperature=np.ones(num_requests, np.float32),
        top_p=np.where(half & filtered, 0.9, 1.0).astype(np.float32),
        top_k=np.where(half & filtered, 50, 0).astype(np.int32),
        remaining=np.full(num_requests, 1000, np.int32),
        stop_ids=np.zeros(0, np.int32),
        stop_offsets=np.zeros(num_requests + 1, np.int32),
    )


def random_logits(num_rows: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """[R, V]: peaked as a language model's, some entries well above the rest."""
    generator = torch.Generator(device).manual_seed(seed)
    return (3 * torch.randn(num_rows, vocab, generator=generator, device=device)).to(dtype)


def decode_plan(num_requests: int, width: int, context: int) -> tuple[StepPlan, SamplingRows]:
    """A pass in which every request has one pending and width - 1 draft tokens after `context` tokens."""
    tokens, slots = num_requests * width, np.arange(num_requests)
    drafts = np.where(np.arange(tokens) % width == width - 1, -1, 3).astype(np.int32)
    nothing = np.zeros(0, np.int64)
    plan = StepPlan(
        token_ids=np.full(tokens, 3, np.int64),
        slots=np.repeat(slots, width),
        positions=np.tile(np.arange(context, context + width), num_requests),
        live_slots=slots,
        widths=np.full(num_requests, width, np.int64),
        chunk_slots=nothing,
        chunk_sizes=nothing,
        sampling_slots=slots,
        row_offsets=np.arange(0, tokens + 1, width),
        row_drafts=drafts,
        logit_rows=np.arange(tokens),
        draft_rows=slots,
        draft_counts=np.full(num_requests, width - 1),
        draft_sources=nothing,
        num_prefill_tokens=0,
    )
    return plan, sampling_rows(num_requests)


def device_step(
    num_requests: int, width: int, context: int, policy: SplitPolicy, device: torch.device
) -> tuple[int, int, dict[str, torch.Tensor]]:
    """(width bucket, scratch tokens, inputs on the device) of decode_plan."""
    prefixes = np.arange(num_requests), np.zeros(num_requests, np.int64)
    step = make_step(*decode_plan(num_requests, width, context), policy, num_requests, prefixes)
    host = torch.zeros(bucket_bytes(step.bucket), dtype=torch.uint8)
    step.write({name: view.numpy() for name, view in bucket_views(step.bucket, host).items()}, 0, context + width)
    return step.bucket.width, step.bucket.splits * step.bucket.width, bucket_views(step.bucket, host.to(device))


def blocked_cache(
    num_slots: int, length: int, heads: Heads, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(blocked keys, keys, values): one float32 cache in the CPU's layout and in the GPU's."""
    from slipstream.kernels.reference import KEY_BLOCK

    generator = torch.Generator(device).manual_seed(1)
    shape = (num_slots, heads.key_value, length // KEY_BLOCK, heads.dim, KEY_BLOCK)
    blocked = torch.randn(*shape, generator=generator, device=device)
    keys = blocked.transpose(3, 4).flatten(2, 3).contiguous()
    return blocked, keys, torch.randn(keys.shape, generator=generator, device=device)

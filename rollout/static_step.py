"""One step in buffers of fixed places: what a pass reads from the host, padded to a bucket and packed for one copy.

Invariants
- A bucket decides every shape of a pass. A step fits its bucket; what the bucket holds beyond it is padding that
  changes no cache place of a request and no sampled token.
- All inputs of a bucket are views of one buffer: filling the host's copy and copying it once is the whole upload.
- Requests wider than split_plan.MAX_WIDTH go in as several pieces, so no width is too large for the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from slipstream.kernels.reference import SamplingRows
from slipstream.kernels.split_plan import FIXED_SPLIT_KEYS, SKIP, chain_pieces, even_split_keys, plan_splits
from slipstream.rollout.packing import StepPlan

ALIGN = 16
"""Bytes at which every part of the buffer begins: Triton compiles another kernel for pointers that are not aligned."""

PREFILL_TOKENS = 64
"""A pass with prompt tokens is padded to a multiple of this many."""

MIN_STOPS = 16
"""Stop ids of all requests of a pass that every bucket has room for."""

DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number` and at least 1."""
    return 1 << max(number - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Bucket:
    """Capacities of a pass: requests (pieces), their widest, tokens, sampled rows, stop ids, and splits of the keys.

    filtered: top-k or top-p is in use. decoding: no prompt tokens, every token is sampled; only such passes recur
    often enough to be captured.
    """

    requests: int
    width: int
    tokens: int
    rows: int
    stops: int
    splits: int
    filtered: bool
    decoding: bool


@dataclass(frozen=True, slots=True)
class SplitPolicy:
    """How keys are shared by programs. programs: wanted over all heads of a layer; heads: key-value heads;
    batch_invariant: splits of a fixed number of keys."""

    programs: int
    heads: int
    batch_invariant: bool

    def split_keys(self, num_keys: int) -> int:
        """Keys of one split for a batch with that many keys."""
        return FIXED_SPLIT_KEYS if self.batch_invariant else even_split_keys(num_keys, self.heads, self.programs)

    def capacity(self, requests: int, num_splits: int) -> int:
        """Work items to make room for: a constant per batch, or the next power of two of what a fixed split needs."""
        return power_of_two(num_splits) if self.batch_invariant else self.programs // self.heads + requests


def _fields(bucket: Bucket) -> list[tuple[str, int, type[np.generic]]]:
    """Name, length and dtype of every input of a pass, in the order they lie in the buffer."""
    requests, tokens, rows = bucket.requests, bucket.tokens, bucket.rows
    wide: list[tuple[str, int]] = [("token_ids", tokens), ("positions", tokens), ("slots", tokens)]
    wide += [("logit_rows", rows), ("row_offsets", requests + 1), ("seed", requests), ("uid", requests)]
    narrow: list[tuple[str, int]] = [(name, tokens) for name in ("token_request", "ancestors", "depth")]
    per_request = ("slot", "context_len", "prefix_slot", "prefix_len", "position", "top_k", "remaining")
    narrow += [(name, requests) for name in per_request]
    narrow += [("query_offsets", requests + 1), ("work", 4 * bucket.splits), ("spans", 3 * requests)]
    narrow += [("row_drafts", rows), ("stop_offsets", requests + 1), ("stop_ids", bucket.stops)]
    real = [("temperature", requests), ("top_p", requests)]
    return [(*f, np.int64) for f in wide] + [(*f, np.int32) for f in narrow] + [(*f, np.float32) for f in real]


def bucket_bytes(bucket: Bucket) -> int:
    """Bytes of all inputs of a pass of this bucket."""
    return sum(-(-length * np.dtype(dtype).itemsize // ALIGN) * ALIGN for _, length, dtype in _fields(bucket))


def bucket_views(bucket: Bucket, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs as views of a buffer of uint8, at least bucket_bytes(bucket) long; work is [N, 4], spans [B, 3]."""
    views, at = {}, 0
    for name, length, dtype in _fields(bucket):
        size = length * np.dtype(dtype).itemsize
        views[name] = buffer[at : at + size].view(DTYPES[np.dtype(dtype)])
        at += -(-size // ALIGN) * ALIGN
    return views | {"work": views["work"].view(-1, 4), "spans": views["spans"].view(-1, 3)}


@dataclass(frozen=True, slots=True)
class StaticStep:
    """A plan cut into pieces, with the bucket that holds it. arrays: the true part of every input, by name."""

    bucket: Bucket
    arrays: Mapping[str, np.ndarray]

    def write(self, host: Mapping[str, np.ndarray], spare_slot: int, max_len: int) -> None:
        """Fills the host's views: the true part, then padding that does nothing."""
        empty = {
            "slots": spare_slot,
            "token_request": SKIP,
            "row_drafts": -1,
            "work": SKIP,
            "temperature": 1.0,
            "top_p": 1.0,
            "remaining": 1,
        }
        for name, view in host.items():
            part = self.arrays[name]
            view[: len(part)] = part
            if len(part) < len(view):
                # Offsets go on at their last value: requests that are padding own no token and no row.
                view[len(part) :] = part[-1] if name.endswith("_offsets") else empty.get(name, 0)
        # Padding tokens write to the spare slot, each to a place of its own as far as there are enough.
        used = len(self.arrays["positions"])
        host["positions"][used:] = np.arange(self.bucket.tokens - used) % max_len


def make_step(
    plan: StepPlan,
    rows: SamplingRows,
    policy: SplitPolicy,
    max_requests: int,
    prefixes: tuple[np.ndarray, np.ndarray],
) -> StaticStep:
    """Chooses the smallest bucket for a plan. max_requests: no bucket of decoding passes needs more requests; prefixes:
    by slot, where its prefix lies and how long that is, as in SlotKVCache."""
    num_tokens, num_rows = int(plan.widths.sum()), len(plan.row_drafts)
    first = np.cumsum(plan.widths) - plan.widths
    owner, contexts, widths = chain_pieces(plan.positions[first], plan.widths)
    query_offsets = np.zeros(len(owner) + 1, np.int64)
    np.cumsum(widths, out=query_offsets[1:])
    node = np.arange(num_tokens) - np.repeat(query_offsets[:-1], widths)
    ends = contexts + widths
    splits = plan_splits(contexts, widths, np.zeros_like(contexts), policy.split_keys(int(ends.sum())))
    arrays = {
        "token_ids": plan.token_ids[:num_tokens],
        "positions": plan.positions[:num_tokens],
        "slots": plan.slots[:num_tokens],
        "token_request": np.repeat(np.arange(len(owner)), widths),
        # Bit j is token j itself; a chain's ancestors are all tokens before it. Bit 31 is the sign.
        "ancestors": ((np.int64(2) << node) - 1).astype(np.uint32).view(np.int32),
        "depth": node,
        "logit_rows": plan.logit_rows[:num_rows],
        "row_offsets": plan.row_offsets,
        "row_drafts": plan.row_drafts,
        "slot": plan.live_slots[owner],
        "prefix_slot": prefixes[0][plan.live_slots[owner]],
        "prefix_len": prefixes[1][plan.live_slots[owner]],
        "context_len": contexts,
        "query_offsets": query_offsets,
        "work": splits.work,
        "spans": splits.spans,
        "seed": rows.seed.view(np.int64),
        "uid": rows.uid.view(np.int64),
    }
    names = ("position", "top_k", "remaining", "stop_offsets", "stop_ids", "temperature", "top_p")
    arrays |= {name: getattr(rows, name) for name in names}
    decoding = num_rows == num_tokens
    requests = min(power_of_two(len(owner)), max(max_requests, len(owner)))
    width = power_of_two(int(widths.max()))
    tokens = requests * power_of_two(-(-num_tokens // requests))
    if not decoding:
        tokens = -(-num_tokens // PREFILL_TOKENS) * PREFILL_TOKENS
    bucket = Bucket(
        requests=requests,
        width=width,
        tokens=tokens,
        rows=tokens if decoding else power_of_two(num_rows),
        stops=max(MIN_STOPS, power_of_two(len(rows.stop_ids))),
        splits=policy.capacity(requests, len(splits.work)),
        filtered=bool(((rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1))).any()),
        decoding=decoding,
    )
    return StaticStep(bucket, arrays)

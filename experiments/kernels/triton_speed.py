"""Time and bytes of every Triton kernel at the sizes of real models.

Invariants: kernels are called as a step calls them, over static inputs; bytes are those that must be read and written
once; data that a real step would find in memory is rotated, so that no figure is one of the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from slipstream.experiments.kernels.cases import LARGE, SMALL, Heads, device_step, random_logits, sampling_rows
from slipstream.experiments.kernels.timing import Call, microseconds
from slipstream.kernels.linear import linear, rms_norm
from slipstream.kernels.steer import steer
from slipstream.kernels.token_logprob import token_logprob
from slipstream.rollout.static_step import SplitPolicy

BF16 = torch.bfloat16
Case = Iterator[tuple[str, list[Call], int]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is timed. cached_bytes: calls of one figure touch at least this much, more than any L2 cache holds."""

    vocab: int = 151_936
    sampled_rows: tuple[int, ...] = (8, 64, 512)
    context: int = 8192
    requests: int = 8
    widths: tuple[int, ...] = (1, 8, 32)
    heads: dict[str, Heads] = field(default_factory=lambda: {"0.5b": SMALL, "8b": LARGE})
    hidden: int = 896
    inner: int = 4864
    train_tokens: int = 4096
    cached_bytes: int = 2**28


def triton_speed(device: torch.device, rounds: int, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """us and bytes by kernel and size."""
    makers: tuple[Callable[[torch.device, Sizes], Case], ...] = (
        _sampling,
        _attention,
        _cache_writes,
        _layers,
        _training,
    )
    return {
        name: {"us": microseconds(calls, device, rounds), "bytes": size}
        for make in makers
        for name, calls, size in make(device, sizes)
    }


def _copies(size: int, sizes: Sizes) -> int:
    return max(1, -(-sizes.cached_bytes // max(size, 1)))


def _sampling(device: torch.device, sizes: Sizes) -> Case:
    from slipstream.kernels.triton.sample_verify import device_rows, sample_verify

    for dtype, filtered in ((BF16, False), (torch.float32, False), (BF16, True)):
        for num in sizes.sampled_rows:
            rows = device_rows(sampling_rows(num, filtered), device)
            offsets = torch.arange(num + 1, device=device)
            drafts = torch.full((num,), -1, dtype=torch.int32, device=device)
            size = num * sizes.vocab * dtype.itemsize
            pool = [random_logits(num, sizes.vocab, dtype, device, i) for i in range(min(_copies(size, sizes), 8))]
            calls: list[Call] = [partial(sample_verify, x, offsets, drafts, rows) for x in pool]
            kind = "_filtered" if filtered else ""
            yield f"sample_verify{kind}_{str(dtype)[6:]}_{num}_rows", calls, size


def _attention(device: torch.device, sizes: Sizes) -> Case:
    from slipstream.kernels.triton.step_table import step_attention, step_table

    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    for model, heads in sizes.heads.items():
        length = sizes.context + max(sizes.widths)
        size = sizes.requests * sizes.context * heads.row_bytes * BF16.itemsize
        layers = [
            torch.randn(2, sizes.requests, heads.key_value, length, heads.dim, device=device, dtype=BF16)
            for _ in range(min(_copies(size, sizes), 16))
        ]
        for invariant in (False, True):
            policy = SplitPolicy(4 * processors, heads.key_value, invariant)
            for width in sizes.widths:
                bucket, scratch, views = device_step(sizes.requests, width, sizes.context, policy, device)
                table = step_table(views, bucket, scratch, invariant)
                query = torch.randn(len(views["positions"]), heads.query, heads.dim, device=device, dtype=BF16)
                scale = heads.dim**-0.5
                calls: list[Call] = [partial(step_attention, query, kv[0], kv[1], table, scale) for kv in layers]
                kind = "_invariant" if invariant else ""
                yield f"verify_attention{kind}_{model}_{width}_tokens", calls, size


def _cache_writes(device: torch.device, sizes: Sizes) -> Case:
    from slipstream.kernels.triton.append_kv import append_kv, compact_kv

    heads, num = SMALL, sizes.requests
    cache = torch.zeros(2, num, heads.key_value, 64, heads.dim, device=device, dtype=BF16)
    new = torch.randn(2, num, heads.key_value, heads.dim, device=device, dtype=BF16)
    slots, places = torch.arange(num, device=device), torch.full((num,), 5, device=device)
    yield "append_kv", [partial(append_kv, cache[0], cache[1], new[0], new[1], slots, places)], 2 * new.nbytes
    # Every second node is accepted: 15 of 16 rows move.
    numbers = torch.arange(num, dtype=torch.int32, device=device)
    paths = 2 * torch.arange(32, dtype=torch.int32, device=device).clamp(max=15).expand(num, 32).contiguous()
    counts = torch.full((num,), 16 if device.type == "cuda" else 1, dtype=torch.int32, device=device)
    moved = 2 * 2 * 15 * num * heads.key_value * heads.dim * 2
    yield "compact_kv", [partial(compact_kv, cache[0], cache[1], numbers, 0 * numbers, paths, counts)], moved


def _layers(device: torch.device, sizes: Sizes) -> Case:
    x = torch.randn(sizes.requests, sizes.hidden, device=device, dtype=BF16)
    for name, columns in (("linear_narrow", sizes.hidden), ("linear_wide", sizes.inner), ("linear_head", sizes.vocab)):
        size = columns * sizes.hidden * BF16.itemsize
        weights = [
            torch.randn(columns, sizes.hidden, device=device, dtype=BF16) for _ in range(min(_copies(size, sizes), 32))
        ]
        calls: list[Call] = [partial(linear, x, w, backend="triton") for w in weights]
        yield f"{name}_{sizes.requests}_rows", calls, size
        calls = [partial(torch.nn.functional.linear, x, w) for w in weights]
        yield f"torch_{name}_{sizes.requests}_rows", calls, size
    weight = torch.randn(sizes.hidden, device=device, dtype=BF16)
    rows = torch.randn(sizes.train_tokens, sizes.hidden, device=device, dtype=BF16)
    yield "rms_norm", [partial(rms_norm, rows, weight, 1e-6, backend="triton")], 2 * rows.nbytes


def _training(device: torch.device, sizes: Sizes) -> Case:
    """token_logprob is bound by arithmetic: its share of the bandwidth floor is low by nature."""
    hidden = torch.randn(sizes.train_tokens, sizes.hidden, device=device, dtype=BF16)
    weight = torch.randn(sizes.vocab, sizes.hidden, device=device, dtype=BF16) * 0.05
    generator = np.random.default_rng(0)
    targets = torch.from_numpy(generator.integers(0, sizes.vocab, sizes.train_tokens)).to(device)
    calls: list[Call] = [partial(token_logprob, hidden, weight, targets, backend="triton")]
    yield "token_logprob_forward", calls, hidden.nbytes + weight.nbytes
    x = hidden.view(sizes.train_tokens, -1, 64)
    directions = torch.randn(x.shape[1], 64, device=device, dtype=BF16)
    yield "steer", [partial(steer, x, directions, 0.5, backend="triton")], 2 * x.nbytes

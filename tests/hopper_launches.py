"""One call of every Triton kernel as the engine makes it, on CPU tensors: what tests/hopper_compiler.py compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from slipstream.kernels.reference import SamplingRows
from slipstream.kernels.triton import append_kv, linear, sample_verify, step_table, verify_attention
from slipstream.kernels.triton.silu_mul import silu_mul
from slipstream.kernels.triton.steer import launch as turn_heads
from slipstream.kernels.triton.token_logprob import TokenLogprob
from slipstream.rollout.static_step import Bucket, bucket_bytes, bucket_views

BF16, F32 = torch.bfloat16, torch.float32
REQUESTS, HEADS, KV_HEADS, DIM, VOCAB = 8, 14, 2, 64, 151936


def static_views(width: int, splits: int = 272) -> tuple[Bucket, dict[str, torch.Tensor]]:
    tokens = REQUESTS * width
    bucket = Bucket(REQUESTS, width, tokens, tokens, 16, splits, False, True)
    return bucket, bucket_views(bucket, torch.zeros(bucket_bytes(bucket), dtype=torch.uint8))


def cache(dtype: torch.dtype = BF16, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(9, KV_HEADS, 64, dim, dtype=dtype), torch.zeros(9, KV_HEADS, 64, dim, dtype=dtype)


def attend(
    width: int,
    invariant: bool = False,
    dtype: torch.dtype = BF16,
    dim: int = DIM,
    window: int = 0,
    softcap: float = 0.0,
) -> Callable[[], Any]:
    def call() -> Any:
        bucket, views = static_views(width)
        table = step_table.step_table(views, width, bucket.splits * width, invariant)
        query = torch.zeros(bucket.tokens, HEADS, dim, dtype=dtype)
        return step_table.step_attention(query, *cache(dtype, dim), table, 0.125, window, softcap)

    return call


def attend_table() -> Any:
    offsets, contexts = torch.tensor([0, 8, 16]), torch.tensor([30, 3])
    table = verify_attention.request_table(torch.tensor([0, 1]), offsets, contexts)
    return verify_attention.verify_attention(torch.zeros(16, HEADS, DIM, dtype=BF16), *cache(), table, 0.125)


def append() -> Any:
    _, views = static_views(1)
    new = torch.zeros(KV_HEADS, REQUESTS, DIM, dtype=BF16).transpose(0, 1)
    return append_kv.append_kv(*cache(), new, new, views["slots"], views["positions"])


def compact() -> Any:
    numbers = torch.zeros(REQUESTS, dtype=torch.int32)
    slots, paths = torch.arange(REQUESTS), torch.arange(32).expand(REQUESTS, 32)
    return append_kv.compact_kv(*cache(), slots, numbers, paths, numbers)


def sample(dtype: torch.dtype, filtered: bool) -> Callable[[], Any]:
    def call() -> Any:
        bucket, views = static_views(1)
        rows = sample_verify.static_rows(views, filtered)
        logits = torch.zeros(bucket.rows, 1, dtype=dtype).expand(-1, VOCAB).contiguous()
        return sample_verify.sample_verify(logits, views["row_offsets"], views["row_drafts"], rows)

    return call


def sample_eagerly() -> Any:
    num = 4
    zeros = {"position": np.int32, "top_k": np.int32, "seed": np.uint64, "uid": np.uint64}
    rows = SamplingRows(
        **{name: np.zeros(num, dtype) for name, dtype in zeros.items()},
        temperature=np.ones(num, np.float32),
        top_p=np.ones(num, np.float32),
        remaining=np.ones(num, np.int32),
        stop_ids=np.zeros(0, np.int32),
        stop_offsets=np.zeros(num + 1, np.int32),
    )
    drafts = torch.full((num,), -1, dtype=torch.int32)
    logits = torch.zeros(num, 32000, dtype=BF16)
    return sample_verify.sample_verify(logits, torch.arange(num + 1), drafts, sample_verify.device_rows(rows, "cpu"))


def logprobs() -> Any:
    hidden = torch.zeros(64, 896, dtype=BF16, requires_grad=True)
    weight = torch.zeros(4096, 896, dtype=BF16)
    logprob, entropy = TokenLogprob.apply(hidden, weight, None, torch.zeros(64, dtype=torch.int64), 1.0, 0.0, 4096)
    (logprob.nan_to_num() + entropy.nan_to_num()).sum().backward()


def product(num_columns: int, dtype: torch.dtype = BF16) -> Callable[[], Any]:
    """expand: a weight of many rows takes no memory."""
    weight = torch.zeros(1, 896, dtype=dtype).expand(num_columns, 896)
    return lambda: linear.launch_linear(torch.zeros(5, 896, dtype=dtype), weight, torch.zeros(1).expand(num_columns))


def norm() -> Any:
    weight = torch.ones(896, dtype=BF16)
    return linear.launch_rms_norm(torch.zeros(8, 896, dtype=BF16), weight, 1e-6, False, True)


def turn() -> Any:
    x = torch.zeros(16, HEADS, DIM, dtype=BF16)
    mask = torch.ones(HEADS, 1, dtype=torch.bool)
    return turn_heads(x, torch.ones(HEADS, 1, DIM, dtype=BF16), torch.ones(HEADS, 1), mask, None, False)


LAUNCHES: dict[str, Callable[[], Any]] = {
    "attend_1": attend(1),
    "attend_8": attend(8),
    "attend_32": attend(32),
    "attend_1_invariant": attend(1, invariant=True),
    "attend_8_128": attend(8, dim=128),
    "attend_windowed_softcapped": attend(4, window=100, softcap=30.0),
    "attend_float32": attend(4, dtype=F32),
    "attend_table": attend_table,
    "append": append,
    "compact": compact,
    "sample_bfloat16": sample(BF16, filtered=False),
    "sample_filtered": sample(F32, filtered=True),
    "sample_eagerly": sample_eagerly,
    "token_logprob": logprobs,
    "steer": turn,
    "linear_narrow": product(896),
    "linear_wide": product(VOCAB),
    "linear_float32": product(896, F32),
    "rms_norm": norm,
    "silu_mul": lambda: silu_mul(torch.zeros(8, 4864, dtype=BF16), torch.zeros(8, 4864, dtype=BF16)),
}

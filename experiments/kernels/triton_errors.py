"""Largest error of every Triton kernel against its plain twin, at shapes that Triton's interpreter can run.

Invariants: bfloat16 where the GPU would use it; the twin computes in float32 from the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from slipstream.experiments.kernels.cases import TOY, device_step, random_logits, sampling_rows
from slipstream.kernels import reference
from slipstream.kernels.linear import linear, rms_norm
from slipstream.kernels.steer import steer, steer_reference
from slipstream.kernels.token_logprob import token_logprob, token_logprob_reference
from slipstream.rollout.static_step import SplitPolicy

BF16 = torch.bfloat16


def triton_errors(device: torch.device) -> dict[str, dict[str, float]]:
    """max_error by kernel, as a share of the largest value where that is above 1; of sample_verify in log p, with
    tokens_different."""
    torch.manual_seed(0)
    errors: dict[str, Callable[[torch.device], float]] = {
        "verify_attention": _attention_error,
        "append_kv": _append_error,
        "token_logprob": _logprob_error,
        "steer": _steer_error,
        "linear": _linear_error,
        "rms_norm": _norm_error,
    }
    return {"sample_verify": _sample_error(device)} | {
        name: {"max_error": error(device)} for name, error in errors.items()
    }


def _largest(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1.0))


def _sample_error(device: torch.device) -> dict[str, float]:
    from slipstream.kernels.triton.sample_verify import device_rows, sample_verify

    num, rows = 6, sampling_rows(6, filtered=True)
    logits, offsets = random_logits(num, 1000, BF16, device), torch.arange(num + 1)
    drafts = np.full(num, -1, np.int32)
    tables = offsets.to(device), torch.from_numpy(drafts).to(device)
    got = sample_verify(logits, *tables, device_rows(rows, device)).to_host()
    expected = reference.sample_verify(logits.float().cpu().numpy(), offsets.numpy(), drafts, rows)
    error = float(np.abs(got.logprobs - expected.logprobs).max())
    return {"max_error": error, "tokens_different": int((got.tokens != expected.tokens).sum())}


def _attention_error(device: torch.device) -> float:
    from slipstream.kernels.triton.step_table import step_attention, step_table
    from slipstream.kernels.triton.verify_attention import request_table, verify_attention_reference

    requests, width, context = 2, 3, 150
    bucket_width, scratch, views = device_step(requests, width, context, SplitPolicy(8, 2, False), device)
    table = step_table(views, bucket_width, scratch, False)
    keys, values = torch.randn(2, requests, TOY.key_value, context + width, TOY.dim, device=device).to(BF16)
    query = torch.randn(len(views["positions"]), TOY.query, TOY.dim, device=device).to(BF16)
    got = step_attention(query, keys, values, table, 0.2)[: requests * width]
    plain = request_table(torch.arange(requests), torch.tensor([0, 3, 6]), torch.full((2,), context), device=device)
    return _largest(got, verify_attention_reference(query[: requests * width], keys, values, plain, 0.2))


def _append_error(device: torch.device) -> float:
    from slipstream.kernels.triton.append_kv import append_kv

    cache = torch.zeros(2, 3, TOY.key_value, 16, TOY.dim, device=device, dtype=BF16)
    new = torch.randn(2, 3, TOY.key_value, TOY.dim, device=device).to(BF16)
    slots, positions = torch.tensor([2, 0, 1], device=device), torch.tensor([4, 15, 0], device=device)
    append_kv(cache[0], cache[1], new[0], new[1], slots, positions)
    written = torch.stack([part[slots, :, positions] for part in cache])
    return _largest(written, new) + float(cache.abs().sum() - new.abs().sum() > 1)


def _logprob_error(device: torch.device) -> float:
    hidden, weight = torch.randn(9, 64, device=device).to(BF16), torch.randn(300, 64, device=device).to(BF16)
    targets = torch.randint(0, 300, (9,), device=device)
    got = token_logprob(hidden, weight, targets, backend="triton")
    expected = token_logprob_reference(hidden, weight, targets)
    return max(_largest(a, b) for a, b in zip(got, expected, strict=True))


def _steer_error(device: torch.device) -> float:
    x, directions = torch.randn(5, 4, 64, device=device).to(BF16), torch.randn(4, 64, device=device).to(BF16)
    return _largest(steer(x, directions, -0.7, backend="triton"), steer_reference(x, directions, -0.7))


def _linear_error(device: torch.device) -> float:
    x, weight = torch.randn(9, 160, device=device).to(BF16), torch.randn(48, 160, device=device).to(BF16)
    return _largest(linear(x, weight, backend="triton"), reference.linear(x, weight))


def _norm_error(device: torch.device) -> float:
    x, weight = torch.randn(9, 160, device=device).to(BF16), torch.randn(160, device=device).to(BF16)
    return _largest(rms_norm(x, weight, 1e-6, backend="triton"), reference.rms_norm(x, weight, 1e-6))

"""The C++ kernels of the CPU: error against the plain twins, time and bytes.

Invariants: the kernels are called as the engine calls them; bytes are those that must be read and written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from slipstream.experiments.kernels.cases import SMALL, blocked_cache, random_logits, sampling_rows
from slipstream.experiments.kernels.timing import Call, microseconds
from slipstream.kernels import reference
from slipstream.kernels.dispatch import KernelSet, NativeKernels

CPU = torch.device("cpu")
VOCAB, NUM_ROWS = 151_936, 16
NUM_TOKENS, CONTEXT = 32, 1024
HIDDEN, INNER = 896, 4864


def native_kernels(rounds: int) -> dict[str, dict[str, Any]]:
    """Figures by kernel."""
    kernels = NativeKernels("bench", torch.get_num_threads())
    tiles = NativeKernels("bench", torch.get_num_threads(), products="tiles")
    products = _products(kernels, ""), _products(tiles, "_tiles")
    cases = (_sample_verify(kernels), _attention(kernels), _append(kernels), *products, _norm(kernels))
    # The layers serve rollouts only: where gradients are wanted they leave the work to torch.
    with torch.no_grad():
        return {
            name: {"max_error": error, "us": microseconds([call], CPU, rounds), "bytes": size} | more
            for case in cases
            for name, error, call, size, more in case
        }


Case = Iterator[tuple[str, float, Call, int, dict[str, Any]]]


def _sample_verify(kernels: KernelSet) -> Case:
    offsets, drafts = np.arange(NUM_ROWS + 1), np.full(NUM_ROWS, -1, np.int32)
    logits = random_logits(NUM_ROWS, VOCAB, torch.float32, CPU)
    for name, filtered in (("sample_verify", False), ("sample_verify_filtered", True)):
        rows = sampling_rows(NUM_ROWS, filtered)
        got = kernels.sample_verify(logits, offsets, drafts, rows)
        expected = reference.sample_verify(logits.numpy(), offsets, drafts, rows)
        different = {"tokens_different": int((got.tokens != expected.tokens).sum())}
        error = float(np.abs(got.logprobs - expected.logprobs).max())
        call = partial(kernels.sample_verify, logits, offsets, drafts, rows)
        yield name, error, call, logits.nbytes, different


def _attention(kernels: KernelSet) -> Case:
    blocked, keys, values = blocked_cache(NUM_TOKENS, CONTEXT, SMALL, CPU)
    query = torch.randn(NUM_TOKENS, SMALL.query, SMALL.dim)
    slots, positions = torch.arange(NUM_TOKENS), torch.full((NUM_TOKENS,), CONTEXT - 1)
    arguments: Any = (query, blocked, values, slots, positions, SMALL.dim**-0.5, 0, 0.0)
    native: Any = kernels
    difference = native.ragged_attention(*arguments) - reference.ragged_attention(*arguments)
    size = NUM_TOKENS * CONTEXT * SMALL.row_bytes * keys.element_size()
    yield "ragged_attention", float(difference.abs().max()), partial(native.ragged_attention, *arguments), size, {}


def _append(kernels: KernelSet) -> Case:
    blocked, _, values = blocked_cache(NUM_TOKENS, CONTEXT, SMALL, CPU)
    expected = blocked.clone(), values.clone()
    new = torch.randn(2, NUM_TOKENS, SMALL.key_value, SMALL.dim)
    slots, positions = torch.arange(NUM_TOKENS), torch.arange(NUM_TOKENS)
    kernels.append_kv(blocked, values, new[0], new[1], slots, positions)
    reference.append_kv(*expected, new[0], new[1], slots, positions)
    error = max(float((a - b).abs().max()) for a, b in zip((blocked, values), expected, strict=True))
    call = partial(kernels.append_kv, blocked, values, new[0], new[1], slots, positions)
    yield "append_kv", error, call, 2 * new.nbytes, {}


def _products(kernels: KernelSet, suffix: str) -> Case:
    for dtype in (torch.float32, torch.bfloat16):
        product = nn.Linear(HIDDEN, INNER, bias=False, dtype=dtype)
        kernels.adopt(product)
        x = torch.randn(NUM_TOKENS, HIDDEN).to(dtype)
        call = partial(product, x)
        yield (
            f"linear_{str(dtype)[6:]}{suffix}",
            largest(call(), reference.linear(x, product.weight)),
            call,
            _bytes(product),
            {},
        )


def _norm(kernels: KernelSet) -> Case:
    norm = nn.RMSNorm(HIDDEN, eps=1e-6)
    kernels.adopt(norm)
    x = torch.randn(NUM_TOKENS, HIDDEN)
    call = partial(norm, x)
    yield "rms_norm", largest(call(), reference.rms_norm(x, norm.weight, 1e-6)), call, 2 * x.nbytes, {}


def _bytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in layer.parameters())


def largest(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1.0))

"""Log-probability of given tokens and entropy, from hidden states and the LM head, in blocks of the vocabulary.

Invariants
- No tensor of N * V elements exists at any time, forward or backward: the largest temporary has N * vocab_chunk
  elements (and the gradient of the weight, V * H, when it is asked for).
- Every logit is computed with float32 accumulation and stays float32 until it is reduced; the gradients of hidden are
  summed over the vocabulary in float32 and rounded once.
- The distribution is softmax(softcapped logits / temperature), the one the sampler draws from (law 2).
- Ignored rows give exactly 0 and add nothing to any gradient, whatever finite or non-finite value they hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slipstream.kernels.dispatch import Backend, pick_backend

IGNORE_INDEX = -100
"""Target of a row that does not count, as in torch.nn.functional.cross_entropy."""

VOCAB_CHUNK = 4096
"""Columns of logits held at once in the twin and in the backward pass: 128 MiB of float32 for 8,192 rows."""


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    vocab_chunk: int = VOCAB_CHUNK,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """log p of each target and entropy of each distribution, in nats, both differentiable: ([N], [N]) float32.

    With z = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature and p = softmax(z):
    log p_y = z_y - logsumexp(z), with gradient onehot(y) - p in z; entropy = -sum p log p, with gradient
    -p_j (log p_j + entropy) in z.

    hidden: [N, H] and weight: [V, H], both float32 or both bfloat16; bias: [V] or None; targets: [N] int64 in
    0 .. V - 1, or IGNORE_INDEX, for which both results are 0 and no gradient flows. softcap: bound of the logits
    (Gemma 2's final softcapping), 0 for none. vocab_chunk: columns of logits held at once by the twin, and by the
    backward pass of both backends. backend: `auto` takes Triton on CUDA and the plain twin elsewhere.

    A target out of range raises ValueError on the CPU; on CUDA, where looking would stall the stream, its row is NaN.
    Logits must be finite: a bias of -1e30, not -inf, rules a token out; NaN or +inf make their row NaN.

    Raises ValueError for wrong shapes, dtypes, numbers and backends.
    """
    _check(hidden, weight, targets, temperature, bias, softcap, vocab_chunk)
    if pick_backend(backend, hidden.device) == "triton":
        from slipstream.kernels.triton.token_logprob import TokenLogprob

        return TokenLogprob.apply(hidden, weight, bias, targets, float(temperature), float(softcap), vocab_chunk)
    return token_logprob_reference(hidden, weight, targets, temperature, bias, softcap, vocab_chunk)


def token_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    vocab_chunk: int = VOCAB_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The plain twin: arguments and results of `token_logprob`, on any device.

    The backward pass is autograd's: each chunk's logits are forgotten after use and computed again for its gradient.
    """
    ignored = targets == IGNORE_INDEX
    # One float32 copy, so that autograd also sums the chunks' gradients in float32.
    rows = hidden.float().masked_fill(ignored[:, None], 0.0)
    weights = weight.split(vocab_chunk)
    biases = [None] * len(weights) if bias is None else bias.split(vocab_chunk)
    parts = [
        checkpoint(
            _chunk_sums,
            rows,
            block,
            offset,
            targets - index * vocab_chunk,
            temperature,
            softcap,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for index, (block, offset) in enumerate(zip(weights, biases, strict=True))
    ]
    tops, sums, dots, picked = (torch.stack(column) for column in zip(*parts, strict=True))
    peak = tops.amax(0)
    scale = (tops - peak).exp()
    total = (sums * scale).sum(0)
    dot = ((dots + sums * (tops - peak)) * scale).sum(0)
    log_total = total.log()
    invalid = (targets < 0) | (targets >= len(weight))
    logprobs = (picked.sum(0) - peak - log_total).masked_fill(invalid, math.nan).masked_fill(ignored, 0.0)
    entropy = (log_total - dot / total).masked_fill(invalid, math.nan).masked_fill(ignored, 0.0)
    return logprobs, entropy


def _chunk_sums(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one chunk's logits z, per row: m = max z (a constant), sum e^(z - m), sum e^(z - m) (z - m), and z at the
    target or 0 where the target lies in another chunk. rows: [N, H] float32; weight: [C, H]; targets: [N] from the
    chunk's start. The result does not depend on m, so that its gradient is none."""
    logits = rows @ weight.float().T
    if bias is not None:
        logits = logits + bias.float()
    if softcap > 0.0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    inside = (targets >= 0) & (targets < len(weight))
    picked = logits.gather(1, torch.where(inside, targets, 0)[:, None]).squeeze(1)
    top = logits.detach().amax(1)
    shifted = logits - top[:, None]
    mass = shifted.exp()
    return top, mass.sum(1), (mass * shifted).sum(1), torch.where(inside, picked, 0.0)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    bias: Tensor | None,
    softcap: float,
    vocab_chunk: int,
) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; allowed: [N, H]")
    rows, width = hidden.shape
    if weight.dim() != 2 or len(weight) == 0 or weight.shape[1] != width:
        raise ValueError(f"weight has shape {list(weight.shape)}; allowed: [V, {width}] with V at least 1")
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype} {list(targets.shape)}; allowed: torch.int64 [{rows}]")
    if hidden.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; allowed: both torch.float32 or both torch.bfloat16"
        )
    if bias is not None and (bias.shape != (len(weight),) or bias.dtype not in (torch.float32, torch.bfloat16)):
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)}; allowed: torch.float32 or torch.bfloat16 [{len(weight)}]"
        )
    others = (weight, targets) if bias is None else (weight, targets, bias)
    if any(other.device != hidden.device for other in others):
        devices = ", ".join(str(other.device) for other in others)
        raise ValueError(f"hidden is on {hidden.device} and the rest on {devices}; allowed: one device")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; allowed: above 0 and finite")
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap is {softcap}; allowed: 0 (none) or above, finite")
    if vocab_chunk < 1:
        raise ValueError(f"vocab_chunk is {vocab_chunk}; allowed: at least 1")
    if hidden.device.type == "cpu":
        wrong = targets[(targets != IGNORE_INDEX) & ((targets < 0) | (targets >= len(weight)))]
        if len(wrong):
            raise ValueError(f"targets hold {int(wrong[0])}; allowed: 0 .. {len(weight) - 1} or {IGNORE_INDEX}")

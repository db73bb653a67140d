"""Triton kernels of `slipstream.kernels.token_logprob`, forward and backward.

Invariants
- Forward: one program per (row block, vocabulary split) keeps logits in registers only; a split leaves four float32
  numbers a row (max, sum, dot, target), which a second kernel adds up. No atomics: the same input gives the same bits
  on the same device. The number of splits follows N and the device, so a row may differ in its last bits between
  batches of different size.
- Backward: per vocabulary chunk one matmul gives the logits again in float32, one elementwise kernel turns them into
  their gradient, and two matmuls with float32 accumulation spend it. [N, vocab_chunk] is the largest temporary
  (float32, for bfloat16 inputs one more in bfloat16: the tensor cores take that as input).
- float32 inputs use full float32 products (no TF32 in the kernel; the matmuls follow torch's own setting, off by
  default).
- Under the interpreter bfloat16 tiles are widened first: it has no bfloat16 product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

INTERPRETED = triton.knobs.runtime.interpret
IGNORE = tl.constexpr(-100)
"""slipstream.kernels.token_logprob.IGNORE_INDEX, as a constant of the kernels."""

PROGRAMS_PER_SM = 4
"""Programs wanted per multiprocessor before the vocabulary is no longer split further."""


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """tanh(x) = 1 - 2 / (e^(2x) + 1): right at both infinities of the exponential, absolute error about 1e-7."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _product(
    total: tl.tensor,
    left_at: tl.tensor,
    right_at: tl.tensor,
    row_ok: tl.tensor,
    column_ok: tl.tensor,
    WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """total + left @ right, from pointers to the first BLOCK_K of WIDTH inner elements."""
    inner = tl.arange(0, BLOCK_K)
    for start in range(0, WIDTH, BLOCK_K):
        inner_ok = inner < WIDTH - start
        left = tl.load(left_at, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
        right = tl.load(right_at, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
        left_at += BLOCK_K
        right_at += BLOCK_K
    return total


@triton.jit
def _partials_kernel(
    hidden: tl.tensor,  # [N, H]
    weight: tl.tensor,  # [V, H]
    bias: tl.tensor,  # [V], read when HAS_BIAS
    targets: tl.tensor,  # [N] int64
    partials: tl.tensor,  # [4, splits, N] float32: max, sum, dot, target
    num_rows: tl.tensor,
    vocab_size: tl.tensor,
    stride_hidden: tl.tensor,
    stride_weight: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < num_rows
    target = tl.load(targets + rows, mask=row_ok, other=-1)
    inner = tl.arange(0, BLOCK_K)
    hidden_start = hidden + rows.to(tl.int64)[:, None] * stride_hidden + inner[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    dot = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.zeros([BLOCK_M], tl.float32)
    # A split has at least one real tile, its first; what lies past the vocabulary adds 0.
    for tile in range(TILES):
        columns = (split * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_ok = columns < vocab_size
        weight_start = weight + columns.to(tl.int64)[None, :] * stride_weight + inner[:, None]
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        logits = _product(logits, hidden_start, weight_start, row_ok, column_ok, WIDTH, WIDEN, BLOCK_K)
        if HAS_BIAS:
            logits += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
        if HAS_SOFTCAP:
            logits = softcap * _tanh(logits / softcap)
        logits = tl.where(column_ok[None, :], logits / temperature, float("-inf"))
        picked += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
        # Online softmax; dot is sum e^(z - top) (z - top), so that the entropy does not cancel for large logits.
        new_top = tl.maximum(top, tl.max(logits, 1))
        shifted = logits - new_top[:, None]
        mass = tl.exp(shifted)
        moved = tl.where(total > 0.0, top - new_top, 0.0)
        decay = tl.exp(moved)
        dot = decay * (dot + moved * total) + tl.sum(mass * tl.where(mass > 0.0, shifted, 0.0), 1)
        total = decay * total + tl.sum(mass, 1)
        top = new_top
    # At most max(N, 128 * programs) elements a plane: 32 bits are enough.
    plane = tl.num_programs(1) * num_rows
    at = partials + split * num_rows + rows
    tl.store(at, top, mask=row_ok)
    tl.store(at + plane, total, mask=row_ok)
    tl.store(at + 2 * plane, dot, mask=row_ok)
    tl.store(at + 3 * plane, picked, mask=row_ok)


@triton.jit
def _combine_kernel(
    partials: tl.tensor,  # [4, splits, N] float32
    targets: tl.tensor,  # [N] int64
    stats: tl.tensor,  # [4, N] float32: log p, entropy, max, log of the sum of e^(z - max)
    num_rows: tl.tensor,
    vocab_size: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < num_rows
    plane = SPLITS * num_rows
    top = tl.load(partials + rows, mask=row_ok, other=0.0)
    total = tl.load(partials + plane + rows, mask=row_ok, other=1.0)
    dot = tl.load(partials + 2 * plane + rows, mask=row_ok, other=0.0)
    picked = tl.load(partials + 3 * plane + rows, mask=row_ok, other=0.0)
    for split in range(1, SPLITS):
        at = partials + split * num_rows + rows
        other_top = tl.load(at, mask=row_ok, other=0.0)
        other_total = tl.load(at + plane, mask=row_ok, other=0.0)
        other_dot = tl.load(at + 2 * plane, mask=row_ok, other=0.0)
        picked += tl.load(at + 3 * plane, mask=row_ok, other=0.0)
        new_top = tl.maximum(top, other_top)
        moved, other_moved = top - new_top, other_top - new_top
        decay, other_decay = tl.exp(moved), tl.exp(other_moved)
        dot = decay * (dot + moved * total) + other_decay * (other_dot + other_moved * other_total)
        total = decay * total + other_decay * other_total
        top = new_top
    target = tl.load(targets + rows, mask=row_ok, other=0)
    valid = (target >= 0) & (target < vocab_size)
    log_total = tl.log(total)
    logprob = tl.where(valid, picked - top - log_total, float("nan"))
    entropy = tl.where(valid, log_total - dot / total, float("nan"))
    out = stats + rows
    tl.store(out, tl.where(target == IGNORE, 0.0, logprob), mask=row_ok)
    tl.store(out + num_rows, tl.where(target == IGNORE, 0.0, entropy), mask=row_ok)
    tl.store(out + 2 * num_rows, top, mask=row_ok)
    tl.store(out + 3 * num_rows, log_total, mask=row_ok)


@triton.jit
def _logit_gradient_kernel(
    logits: tl.tensor,  # [N, C] float32: hidden @ weight.T of one chunk
    out: tl.tensor,  # [N, C]; may be logits itself
    bias: tl.tensor,  # [C], read when HAS_BIAS
    targets: tl.tensor,  # [N] int64
    stats: tl.tensor,  # [4, N] float32, from _combine_kernel
    grad_logprob: tl.tensor,  # [N] float32
    grad_entropy: tl.tensor,  # [N] float32
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    first_column: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, column_ok = rows < num_rows, columns < num_columns
    ok = row_ok[:, None] & column_ok[None, :]
    target = tl.load(targets + rows, mask=row_ok, other=IGNORE)
    row_stats = stats + rows
    entropy = tl.load(row_stats + num_rows, mask=row_ok, other=0.0)
    top = tl.load(row_stats + 2 * num_rows, mask=row_ok, other=0.0)
    log_total = tl.load(row_stats + 3 * num_rows, mask=row_ok, other=0.0)
    toward_logprob = tl.load(grad_logprob + rows, mask=row_ok, other=0.0)
    toward_entropy = tl.load(grad_entropy + rows, mask=row_ok, other=0.0)
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    value = tl.load(logits + at, mask=ok, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    slope = tl.full([BLOCK_M, BLOCK_N], 1.0, tl.float32)
    if HAS_SOFTCAP:
        bounded = _tanh(value / softcap)
        slope = 1.0 - bounded * bounded
        value = softcap * bounded
    log_p = value / temperature - top[:, None] - log_total[:, None]
    p = tl.exp(log_p)
    is_target = (columns[None, :] + first_column) == target[:, None]
    surprise = p * tl.where(p > 0.0, log_p + entropy[:, None], 0.0)
    grad = toward_logprob[:, None] * (tl.where(is_target, 1.0, 0.0) - p) - toward_entropy[:, None] * surprise
    grad = tl.where(target[:, None] == IGNORE, 0.0, grad * slope / temperature)
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=ok)


class TokenLogprob(torch.autograd.Function):
    """Arguments and results of `token_logprob`, which checks them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float,
        vocab_chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """Keeps the inputs and four numbers a row."""
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        targets = targets.contiguous()
        bias = None if bias is None else bias.contiguous()
        with torch.cuda.device_of(hidden):
            stats = _row_stats(hidden, weight, bias, targets, temperature, softcap)
        ctx.save_for_backward(hidden, weight, bias, targets, stats)
        ctx.numbers = temperature, softcap, vocab_chunk
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """One matmul, one elementwise kernel and two matmuls per vocabulary chunk."""
        hidden, weight, bias, targets, stats = ctx.saved_tensors
        temperature, softcap, vocab_chunk = ctx.numbers
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        # A product with 0 would keep NaN and infinity of ignored rows alive in the gradient of the weight.
        rows = hidden.masked_fill((targets == IGNORE.value)[:, None], 0.0)
        grad_rows = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device) if for_hidden else None
        grad_weight = torch.empty_like(weight) if for_weight else None
        grad_bias = torch.empty_like(bias) if for_bias else None
        upstream = grad_logprob.contiguous(), grad_entropy.contiguous()
        with torch.cuda.device_of(hidden):
            for start in range(0, len(weight), vocab_chunk):
                chunk = slice(start, min(start + vocab_chunk, len(weight)))
                offset = None if bias is None else bias[chunk]
                logits = _matmul(rows, weight[chunk].T)
                grads = _logit_gradient(logits, offset, targets, stats, *upstream, start, temperature, softcap, rows)
                del logits
                if grad_rows is not None:
                    grad_rows += _matmul(grads, weight[chunk])
                if grad_weight is not None:
                    grad_weight[chunk] = _matmul(grads.T, rows)
                if grad_bias is not None:
                    grad_bias[chunk] = grads.sum(0, dtype=torch.float32)
        grad_hidden = None if grad_rows is None else grad_rows.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product in float32; bfloat16 factors stay bfloat16 on CUDA, where the accumulator is float32 anyway."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _row_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, softcap: float
) -> Tensor:
    """log p, entropy, max and log of the sum of e^(z - max), per row: [4, N] float32."""
    num_rows, width = hidden.shape
    vocab_size = len(weight)
    stats = torch.empty((4, num_rows), dtype=torch.float32, device=hidden.device)
    if num_rows == 0:
        return stats
    # Without tensor cores (float32 in full precision) smaller tiles keep the accumulator out of local memory.
    block_n, block_k, stages = (64, 32, 3) if hidden.dtype == torch.float32 else (128, 64, 4)
    block_m = max(16, min(block_n, triton.next_power_of_2(num_rows)))
    row_blocks, tiles = triton.cdiv(num_rows, block_m), triton.cdiv(vocab_size, block_n)
    # Powers of two, because every value is compiled on its own.
    tiles_per_split = triton.next_power_of_2(triton.cdiv(tiles * row_blocks, _num_programs(hidden.device)))
    splits = triton.cdiv(tiles, tiles_per_split)
    partials = torch.empty((4, splits, num_rows), dtype=torch.float32, device=hidden.device)
    # Row blocks run fastest, so that the programs of one wave share the weight tiles in L2.
    _partials_kernel[(row_blocks, splits)](
        hidden,
        weight,
        weight if bias is None else bias,
        targets,
        partials,
        num_rows,
        vocab_size,
        hidden.stride(0),
        weight.stride(0),
        temperature,
        softcap,
        WIDTH=width,
        TILES=tiles_per_split,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap > 0.0,
        WIDEN=INTERPRETED and hidden.dtype == torch.bfloat16,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if block_m == 128 else 4,
        num_stages=stages,
    )
    grid = (triton.cdiv(num_rows, 128),)
    _combine_kernel[grid](partials, targets, stats, num_rows, vocab_size, SPLITS=splits, BLOCK=128)
    return stats


def _logit_gradient(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    first_column: int,
    temperature: float,
    softcap: float,
    rows: Tensor,
) -> Tensor:
    """The gradient of one chunk's products [N, C], in the dtype the next matmuls take: that of `rows`, or float32
    where there is no bfloat16 product. A float32 gradient overwrites the logits."""
    num_rows, num_columns = logits.shape
    out = torch.empty_like(logits, dtype=rows.dtype) if rows.is_cuda and rows.dtype != logits.dtype else logits
    if num_rows == 0:
        return out
    block_m, block_n = 8, 256
    _logit_gradient_kernel[(triton.cdiv(num_rows, block_m), triton.cdiv(num_columns, block_n))](
        logits,
        out,
        logits if bias is None else bias,
        targets,
        stats,
        grad_logprob,
        grad_entropy,
        num_rows,
        num_columns,
        first_column,
        temperature,
        softcap,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap > 0.0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out


def _num_programs(device: torch.device) -> int:
    """How many programs keep the device busy; a small number under the interpreter."""
    if device.type != "cuda":
        return 4
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count

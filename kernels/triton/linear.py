"""Triton kernels of kernels/linear.py: a product of fixed tiles without split-K, and a norm with one program a row.

Invariants
- Tile shapes follow from the layer's widths and dtype. The number of rows decides only how many programs there are, and
  whether it is 1 or a multiple of 16 compiles no other kernel.
- The inner dimension is summed from first to last in steps of BLOCK_K by one program; rows beyond the last are zeros.
- The guarantee is per device and build, and needs a matrix unit that treats all rows of a tile alike.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are values of the device: no Python type names them)
from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret

PROCESSORS = 132
"""Multiprocessors that a layer should fill; a constant, because the tile must not depend on the machine's load."""


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x, weight, bias, out, num_rows, weight_stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_ok, column_ok = row < num_rows, column < COLUMNS
    x_at = x + row[:, None] * WIDTH + inner[None, :]
    weight_at = weight + column[None, :] * weight_stride + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        inner_ok = inner < WIDTH - start
        left = tl.load(x_at + start, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
        right = tl.load(weight_at + start, mask=column_ok[None, :] & inner_ok[:, None], other=0.0)
        total = tl.dot(left.to(DOT_DTYPE), right.to(DOT_DTYPE), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    place = out + row[:, None] * COLUMNS + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def _rms_norm_kernel(
    x, weight, out, eps, WIDTH: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    inside = lane < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + lane
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value = value * (1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / WIDTH + eps))
    if ROUND_FIRST:
        value = value.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    tl.store(out + at, (value * factor).to(out.dtype.element_ty), mask=inside)


def tile_of(num_columns: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rows, columns, inner steps, pipeline stages) of a tile: narrow layers get narrow tiles, to fill the chip.

    64 rows are one step of Hopper's matrix units; float32 has no exact matrix unit and runs on the plain ones.
    """
    if dtype == torch.float32:
        return 32, 32, 32, 3
    wide = [columns for columns in (128, 64, 32) if num_columns >= columns * PROCESSORS]
    return 64, max(wide, default=32), 128 if not wide else 64, 4


def launch_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Checked arguments of `linear`: x [M, K] contiguous, weight [N, K] contiguous in K; returns [M, N]."""
    (num_rows, width), num_columns = x.shape, len(weight)
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    block_m, block_n, block_k, stages = tile_of(num_columns, x.dtype)
    dot_dtype = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]
    # Row blocks run fastest, so that programs of one wave share the weight tile in the L2 cache.
    with torch.cuda.device_of(x):
        _linear_kernel[(triton.cdiv(num_rows, block_m), triton.cdiv(num_columns, block_n))](
            x, weight, weight if bias is None else bias.contiguous(), out, num_rows, weight.stride(0),
            WIDTH=width, COLUMNS=num_columns, HAS_BIAS=bias is not None,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            # The interpreter holds bfloat16 as integers and cannot multiply it; its products are exact in float32.
            DOT_DTYPE=tl.float32 if INTERPRETED else dot_dtype, num_warps=4, num_stages=stages,
        )  # fmt: skip
    return out


def launch_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool, round_first: bool
) -> torch.Tensor:
    """Checked arguments of `rms_norm`: x [M, D] contiguous; returns [M, D]."""
    num_rows, width = x.shape
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(num_rows,)](
            x, weight.contiguous(), out, eps, WIDTH=width, UNIT_OFFSET=unit_offset, ROUND_FIRST=round_first,
            BLOCK=block, num_warps=min(max(block // 512, 1), 8),
        )  # fmt: skip
    return out

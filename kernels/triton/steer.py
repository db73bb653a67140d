"""Triton kernel of `slipstream.kernels.steer.steer`: one program per token and block of heads.

Invariants
- A vector is read once and written at most once; what is not rotated is written back as it was read, or not at all in
  place, so it stays bit-equal.
- The launch neither waits for the device nor looks at its data: it can be captured in a CUDA graph.
- Every vector is computed without regard to any other: the result does not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 2048
"""Elements of x per program, in whole heads: short heads share a program."""


@triton.jit
def _steer_kernel(
    x: tl.tensor,  # [T, heads, D], any strides
    out: tl.tensor,  # [T, heads, D], any strides; x itself in place
    directions: tl.tensor,  # [heads, R, D] contiguous
    strength: tl.tensor,  # [heads, R] float32
    mask: tl.tensor,  # [heads, R] uint8
    token_mask: tl.tensor,  # [T] uint8, read when HAS_TOKEN_MASK
    num_heads: tl.tensor,
    width: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    x_element: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    out_element: tl.tensor,
    DIRECTIONS: tl.constexpr,
    HAS_TOKEN_MASK: tl.constexpr,
    INPLACE: tl.constexpr,
    VANISHED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    elements = tl.arange(0, BLOCK_D)
    head_ok = heads < num_heads
    ok = head_ok[:, None] & (elements < width)[None, :]
    steered = True
    if HAS_TOKEN_MASK:
        steered = tl.load(token_mask + token) != 0
    heads = heads.to(tl.int64)
    raw = tl.load(x + token * x_token + heads[:, None] * x_head + elements[None, :] * x_element, mask=ok, other=0.0)
    value = raw.to(tl.float32)
    peak = tl.max(tl.abs(value), 1)
    scale = tl.where(peak > 0.0, peak, 1.0)[:, None]
    start = value / scale
    turned = start
    changed = tl.zeros([BLOCK_H], tl.int32)
    if steered:
        for index in range(DIRECTIONS):
            row = heads * DIRECTIONS + index
            vector = tl.load(directions + row[:, None] * width + elements[None, :], mask=ok, other=0.0).to(tl.float32)
            vector_peak = tl.max(tl.abs(vector), 1)
            vector = vector / tl.where(vector_peak > 0.0, vector_peak, 1.0)[:, None]
            square = tl.sum(vector * vector, 1)
            factor = tl.load(strength + row, mask=head_ok, other=0.0)
            applies = (tl.load(mask + row, mask=head_ok, other=0) != 0) & (factor != 0.0) & (square > 0.0)
            along = tl.sum(turned * vector, 1)
            share = tl.where(applies, factor / tl.where(square > 0.0, square, 1.0), 0.0)
            turned += (share * along)[:, None] * vector
            changed = tl.where(applies, 1, changed)
    norm = tl.sqrt(tl.sum(start * start, 1))
    turned_norm = tl.sqrt(tl.sum(turned * turned, 1))
    rotated = (changed != 0) & (turned_norm > VANISHED * norm)
    gain = norm / tl.where(rotated, turned_norm, 1.0)
    result = tl.where(rotated[:, None], (turned * gain[:, None] * scale).to(raw.dtype), raw)
    store = ok
    if INPLACE:
        store = ok & rotated[:, None]
    tl.store(out + token * out_token + heads[:, None] * out_head + elements[None, :] * out_element, result, mask=store)


def launch(
    x: Tensor, directions: Tensor, strength: Tensor, mask: Tensor, token_mask: Tensor | None, inplace: bool
) -> Tensor:
    """Checked arguments of `steer`, without its gradient. directions: [heads, R, D]; strength: [heads, R] float32;
    mask: [heads, R] bool; token_mask: [T] bool or None. Returns x in place, else a new tensor."""
    from slipstream.kernels.steer import VANISHED

    num_tokens, num_heads, width = x.shape
    out = x if inplace else torch.empty_like(x)
    if x.numel() == 0:
        return out
    block_d = triton.next_power_of_2(width)
    block_h = max(1, min(triton.next_power_of_2(num_heads), TILE_ELEMENTS // block_d))
    token_flags = mask if token_mask is None else token_mask
    with torch.cuda.device_of(x):
        _steer_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
            x,
            out,
            directions.contiguous(),
            strength.contiguous(),
            mask.contiguous().view(torch.uint8),
            token_flags.contiguous().view(torch.uint8),
            num_heads,
            width,
            *x.stride(),
            *out.stride(),
            DIRECTIONS=directions.shape[1],
            HAS_TOKEN_MASK=token_mask is not None,
            INPLACE=inplace,
            VANISHED=VANISHED,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            num_warps=4 if block_h * block_d <= 4096 else 8,
        )
    return out

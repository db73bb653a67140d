"""The noise of law 1 on a GPU: Philox4x32-10 words and the Gumbel variates made from them.

Invariants
- The words equal reference.philox4x32 bit for bit: key = seed, counter = (vocabulary index // 4, position, uid low
  word, uid high word), one counter for four neighbouring vocabulary entries.
- gumbel_from_bits is reference.gumbel: u = (b + 1/2) / 2**32 is exact in float64, both logarithms are float64, and the
  result is rounded to float32 once. A device's float64 logarithm may differ from the host's in its last bits; the
  rounding to float32 hides that for all but about one variate in 2**28. This is the "floating-point tie" of law 1:
  a token can differ only if such a variate is also within one float32 rounding of winning or losing the row.
- gumbel_ceiling(b) >= gumbel_from_bits(b) for every word b, in float32 arithmetic alone. Rounded addition is monotone,
  so scaled + ceiling >= scaled + noise also holds after rounding: noisy_argmax passes over nothing that could win.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are values of the device: no Python type names them)
from __future__ import annotations

import torch
import triton
import triton.language as tl

CEILING_MARGIN: tl.constexpr = tl.constexpr(1e-4)
"""Added to the float32 ceiling; at least ten times its worst rounding error (see gumbel_ceiling)."""


@triton.jit
def noise_bits(seed, uid, position, first, BLOCK: tl.constexpr):
    """Philox words of the vocabulary entries first .. first + BLOCK: [BLOCK] uint32.

    seed, uid: int64 scalars, the bit patterns of the unsigned numbers; position: int32 scalar; first: int32 scalar, a
    multiple of 4; BLOCK: a power of two, at least 4.
    """
    counter = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    low = uid.to(tl.uint32)
    high = (uid >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, position.to(tl.uint32), low, high)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def gumbel_from_bits(bits):
    """Gumbel(0, 1) variates of 32-bit words: float32, computed in float64. bits: any shape, uint32."""
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def gumbel_ceiling(bits):
    """A float32 upper bound of gumbel_from_bits with one float32 logarithm. bits: any shape, uint32.

    With d = 1 - u, -log(u) = d + d^2/2 + d^3/3 + ... >= t = d (1 + d/2 + d^2/3), so g <= -log(t). In float32, t has a
    relative error below 8 roundings of 2^-24 (5e-7), and |log t| < 23 costs a logarithm good to 2^-22 relative 6e-6;
    rounding g itself costs 1e-6. The sum is below 1e-5, a tenth of CEILING_MARGIN. Above u = 0.9 the bound lies within
    4e-4 of g.
    """
    below_one = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = below_one * (1.0 + below_one * (0.5 + below_one * 0.33333334))
    return CEILING_MARGIN - tl.log(series)


@triton.jit
def noisy_argmax(scaled, bits, best, BLOCK: tl.constexpr):
    """The larger of best and the block's largest scaled + noise, and that entry's lane, -1 where best is as large.

    scaled: [BLOCK] float32, finite or -inf; bits: [BLOCK] uint32; best: float32 scalar. Ties go to the lowest lane.
    Exact noise is computed for the entry with the highest ceiling, if it is above best, and for the whole block only if
    another ceiling reaches the value then known: in ordinary rows below one block in 100, with many ties in all.
    """
    ceiling = scaled + gumbel_ceiling(bits)
    top, lane = tl.max(ceiling, 0, return_indices=True)
    value, winner = best, tl.cast(-1, tl.int32)
    if top > best:
        alone = tl.arange(0, BLOCK) == lane
        exact = tl.sum(tl.where(alone, scaled, 0.0), 0) + gumbel_from_bits(tl.sum(tl.where(alone, bits, 0), 0))
        if tl.max(tl.where(alone, float("-inf"), ceiling), 0) >= tl.maximum(best, exact):
            exact, lane = tl.max(scaled + gumbel_from_bits(bits), 0, return_indices=True)
        winner = tl.where(exact > best, lane, -1)
        value = tl.maximum(exact, best)
    return value, winner


@triton.jit
def _gumbel_kernel(out, keys, position, vocab_size, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    index = first + tl.arange(0, BLOCK)
    bits = noise_bits(tl.load(keys), tl.load(keys + 1), tl.cast(position, tl.int32), first, BLOCK)
    tl.store(out + index, gumbel_from_bits(bits), mask=index < vocab_size)


def gumbel(seed: int, uid: int, position: int, vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """The twin of reference.gumbel, for checking a device's logarithm: [vocab_size] float32 on `device`.

    seed, uid: 64-bit unsigned; position: below 2**31.
    """
    signed = [value - 2**64 if value >= 2**63 else value for value in (seed, uid)]
    keys = torch.tensor(signed, dtype=torch.int64, device=device)
    out = torch.empty(vocab_size, dtype=torch.float32, device=device)
    block = 1024
    _gumbel_kernel[(triton.cdiv(vocab_size, block),)](out, keys, position, vocab_size, BLOCK=block)
    return out

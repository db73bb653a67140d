"""Blocks that one process copies into shared memory, or changed there, and that others read behind it, on the CPU.

Invariants
- A block is read only once it has the stamp that is asked for, which is stored after its bytes and its sum.
- With native code the copy and the checksums are one pass over the bytes, past the caches; the numpy twin gives the
  same bytes, sums and stamps. Sums are those of kernels/checksum.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from slipstream.kernels.checksum import num_blocks, numpy_block_checksums
from slipstream.kernels.native import NATIVE_ERROR, _native

ALIGN_BYTES = 64
"""Divides block_bytes and the addresses that are copied to."""
_POLL_S = 0.001


@dataclass(frozen=True)
class BlockStream:
    """The blocks of one tensor. data: flat uint8 [N] in shared memory; sums: uint64, stamps: uint32, one a block."""

    data: np.ndarray
    block_bytes: int
    sums: np.ndarray
    stamps: np.ndarray

    def write(self, source: np.ndarray, stamp: int) -> None:
        """Copies flat uint8 [N] block by block, with checksums. ValueError: sizes or alignment do not fit."""
        if NATIVE_ERROR:
            numpy_write(self, source, stamp)
        else:
            _native.copy_blocks(source, self.block_bytes, self.data, self.sums, self.stamps, stamp)

    def seal(self, stamp: int) -> None:
        """Checksums of what `data` holds, block by block: nobody changes it until another stamp."""
        if NATIVE_ERROR:
            numpy_write(self, self.data, stamp)
        else:
            _native.seal_blocks(self.data, self.block_bytes, self.sums, self.stamps, stamp)

    def follow(self, stamp: int, verify: bool, stripes: Stripes, block: int, wait_s: float) -> tuple[int, bool]:
        """Reads the blocks of `stripes` from number `block` on: until the end, the first one that does not match its
        sum, or `wait_s` seconds without the next one. (block it came to, whether that one does not match)."""
        if NATIVE_ERROR:
            return numpy_follow(self, stamp, verify, stripes, block, wait_s)
        blocks = self.data, self.block_bytes, self.sums, self.stamps, stamp, verify
        place = stripes.first, stripes.stripe, stripes.nth, stripes.of, block, int(wait_s * 1e6)
        reached, wrong = _native.follow_blocks(*blocks, *place)
        return int(reached), bool(wrong)


@dataclass(frozen=True, slots=True)
class Stripes:
    """Of every `of` stripes of `stripe` blocks the nth, where block 0 of the tensor is number `first` of all blocks."""

    first: int
    stripe: int
    nth: int
    of: int

    def hold(self, block: int) -> bool:
        """Whether a block of the tensor belongs to them."""
        return (self.first + block) // self.stripe % self.of == self.nth


# ---- the twins


def _part(stream: BlockStream, block: int) -> slice:
    return slice(block * stream.block_bytes, (block + 1) * stream.block_bytes)


def numpy_write(stream: BlockStream, source: np.ndarray, stamp: int) -> None:
    """As BlockStream.write."""
    for block in range(num_blocks(len(stream.data), stream.block_bytes)):
        part = _part(stream, block)
        stream.data[part] = source[part]
        stream.sums[block] = numpy_block_checksums(source[part], stream.block_bytes)[0]
        stream.stamps[block] = stamp


def numpy_follow(
    stream: BlockStream, stamp: int, verify: bool, stripes: Stripes, block: int, wait_s: float
) -> tuple[int, bool]:
    """As BlockStream.follow."""
    until, end = time.monotonic() + wait_s, num_blocks(len(stream.data), stream.block_bytes)
    for number in filter(stripes.hold, range(block, end)):
        while stream.stamps[number] != stamp:
            if time.monotonic() >= until:
                return number, False
            time.sleep(_POLL_S)
        found = numpy_block_checksums(stream.data[_part(stream, number)], stream.block_bytes)[0]
        if verify and found != stream.sums[number]:
            return number, True
    return end, False

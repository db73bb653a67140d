"""Checksums of blocks of bytes, on the CPU at the speed of memory and on any other device with plain torch.

Invariants
- Native code, numpy and torch give the same numbers, whatever the instruction set, the device and the threads.
- A change of one 64-bit word changes the checksum but for a chance of about 2^-59. It finds accidents, such as a torn
  or corrupt transfer; it does not protect against somebody who makes up bytes.

The formula, all modulo 2^64. A block is cut into chunks of 128 words of 8 bytes, little-endian, the last one filled up
with zeros. A chunk's sum is that of ((low + k) mod 2^32) * ((high + k') mod 2^32) + word over its words, where low and
high are a word's halves and k, k' those of the key at its place: NH of UMAC (Black, Halevi, Krawczyk, Krovetz and
Rogaway, CRYPTO 1999) plus the word itself, without which a key that meets its complement hides the other half. With c
chunks counted from 1 the block's checksum is mix(size + sum_c mix(sum of chunk c + c * golden)), where mix is the
finaliser of splitmix64.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from slipstream.kernels.native import NATIVE_ERROR, _native

CHUNK_WORDS = 128
CHUNK_BYTES = 8 * CHUNK_WORDS
GOLDEN = 0x9E3779B97F4A7C15
_TORCH_CHUNKS = 1 << 14
"""Chunks that the torch twin takes at a time: its intermediates are several times as large."""
_TASK_BYTES = 8 << 20
"""Bytes that one thread takes at a time, rounded to whole blocks."""


def num_blocks(num_bytes: int, block_bytes: int) -> int:
    """Blocks of `block_bytes` that hold so many bytes; the last may be shorter."""
    return -(-num_bytes // block_bytes)


def block_checksums(data: torch.Tensor, block_bytes: int, num_threads: int = 1) -> np.ndarray:
    """Checksums of the consecutive blocks of a flat uint8 tensor on any device: uint64 [num_blocks].

    num_threads: of the native code. Raises ValueError for other tensors and for a block_bytes below 1.
    """
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous() or block_bytes < 1:
        raise ValueError(f"checksums need flat uint8 and blocks, not {data.dtype} {list(data.shape)}, {block_bytes}")
    if data.device.type != "cpu":
        return torch_block_checksums(data, block_bytes)
    if NATIVE_ERROR:
        return numpy_block_checksums(data.numpy(), block_bytes)
    out = np.empty(num_blocks(len(data), block_bytes), np.uint64)
    _native_checksums(data.numpy(), block_bytes, out, num_threads)
    return out


def _native_checksums(data: np.ndarray, block_bytes: int, out: np.ndarray, num_threads: int) -> None:
    at_once = max(1, _TASK_BYTES // block_bytes)
    if num_threads == 1 or len(out) <= at_once:
        _native.block_checksums(data, block_bytes, out)
        return

    def part(first: int) -> None:
        last = first + at_once
        _native.block_checksums(data[first * block_bytes : last * block_bytes], block_bytes, out[first:last])

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(part, range(0, len(out), at_once)))


# ---- the twins


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def chunk_keys() -> np.ndarray:
    """The keys of a chunk's words: uint64 [128]."""
    return _mix(np.arange(1, CHUNK_WORDS + 1, dtype=np.uint64) * np.uint64(GOLDEN))


def numpy_block_checksums(data: np.ndarray, block_bytes: int) -> np.ndarray:
    """As block_checksums, on a uint8 array [N]."""
    keys, half = chunk_keys(), np.uint64(0xFFFFFFFF)
    out = np.empty(num_blocks(len(data), block_bytes), np.uint64)
    for i in range(len(out)):
        block = data[i * block_bytes : (i + 1) * block_bytes]
        chunks = np.zeros((-(-len(block) // CHUNK_BYTES), CHUNK_BYTES), np.uint8)
        chunks.reshape(-1)[: len(block)] = block
        words = chunks.view("<u8").astype(np.uint64, copy=False)
        low = (words + keys) & half
        high = ((words >> np.uint64(32)) + (keys >> np.uint64(32))) & half
        sums = (low * high + words).sum(axis=1, dtype=np.uint64)
        place = np.arange(1, len(sums) + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        # Of one entry, not a scalar: numpy warns where a scalar wraps.
        total = _mix(sums + place).sum(dtype=np.uint64, keepdims=True)
        out[i] = _mix(total + np.uint64(len(block)))[0]
    return out


def torch_block_checksums(data: torch.Tensor, block_bytes: int) -> np.ndarray:
    """As block_checksums, in int64 arithmetic on the tensor's device: it wraps as uint64 does."""
    keys = torch.from_numpy(chunk_keys().view(np.int64)).to(data.device)
    out = torch.empty(num_blocks(len(data), block_bytes), dtype=torch.int64, device=data.device)
    for i in range(len(out)):
        block = data[i * block_bytes : (i + 1) * block_bytes]
        total = torch.zeros((), dtype=torch.int64, device=data.device)
        for first in range(0, len(block), _TORCH_CHUNKS * CHUNK_BYTES):
            total += _torch_total(block[first : first + _TORCH_CHUNKS * CHUNK_BYTES], first // CHUNK_BYTES, keys)
        out[i] = _torch_mix(total + len(block))
    return out.cpu().numpy().view(np.uint64)


def _torch_total(part: torch.Tensor, first_chunk: int, keys: torch.Tensor) -> torch.Tensor:
    half = 0xFFFFFFFF
    chunks = torch.zeros(-(-len(part) // CHUNK_BYTES), CHUNK_BYTES, dtype=torch.uint8, device=part.device)
    chunks.view(-1)[: len(part)] = part
    words = chunks.view(torch.int64)
    low = (words + keys) & half
    high = ((words >> 32) + (keys >> 32)) & half
    sums = (low * high + words).sum(dim=1)
    place = torch.arange(first_chunk + 1, first_chunk + len(sums) + 1, device=part.device) * (GOLDEN - 2**64)
    return _torch_mix(sums + place).sum()


def _torch_mix(x: torch.Tensor) -> torch.Tensor:
    def shifted(value: torch.Tensor, by: int) -> torch.Tensor:
        # int64 shifts bring in the sign; the unsigned shift brings in zeros.
        return (value >> by) & ((1 << (64 - by)) - 1)

    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shifted(x, 31)

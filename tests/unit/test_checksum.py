"""Checksums: native code, numpy and torch agree; what a transfer can do to bytes is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.kernels.checksum import (
    CHUNK_BYTES,
    _native,
    block_checksums,
    chunk_keys,
    num_blocks,
    numpy_block_checksums,
    torch_block_checksums,
)


def some_bytes(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def sums(data: np.ndarray, block_bytes: int = 1 << 20) -> list[int]:
    return block_checksums(torch.from_numpy(data), block_bytes).tolist()


@given(st.integers(0, 5000), st.sampled_from([64, 1000, 1024, 4096]), st.integers(0, 9))
def test_the_twins_agree(size: int, block_bytes: int, seed: int) -> None:
    data = some_bytes(size, seed)
    tensor = torch.from_numpy(data)
    expected = numpy_block_checksums(data, block_bytes)
    assert len(expected) == num_blocks(size, block_bytes)
    np.testing.assert_array_equal(torch_block_checksums(tensor, block_bytes), expected)
    np.testing.assert_array_equal(block_checksums(tensor, block_bytes), expected)


def test_instruction_sets_and_threads_agree() -> None:
    data = some_bytes((20 << 20) + 13)
    expected = block_checksums(torch.from_numpy(data), 100_000)
    names = ("plain", "avx2", "avx512")
    for isa in names[: names.index(_native.Context(1).isa) + 1]:
        out = np.empty_like(expected)
        _native.block_checksums(data, 100_000, out, isa)
        np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(block_checksums(torch.from_numpy(data), 100_000, num_threads=3), expected)


def test_every_flipped_bit_is_found() -> None:
    data = some_bytes(1500)
    seen = {sums(data)[0]}
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << (bit % 8)
        seen.add(sums(data)[0])
        data[bit // 8] ^= 1 << (bit % 8)
    assert len(seen) == 8 * len(data) + 1


def test_what_sums_alone_would_miss_is_found() -> None:
    data = some_bytes(8 * CHUNK_BYTES)
    whole = sums(data)
    swapped_words, swapped_chunks, two_top_bits = data.copy(), data.copy(), data.copy()
    swapped_words[:16] = np.roll(data[:16], 8)
    swapped_chunks[: 2 * CHUNK_BYTES] = np.roll(data[: 2 * CHUNK_BYTES], CHUNK_BYTES)
    two_top_bits[[7, 23]] ^= 128
    for changed in (swapped_words, swapped_chunks, two_top_bits, data[:-1], np.append(data, np.uint8(0))):
        assert sums(changed) != whole
    assert len({sums(np.zeros(size, np.uint8))[0] for size in range(1, 3000)}) == 2999, "zeros of different lengths"


def test_a_word_that_cancels_its_key_hides_nothing() -> None:
    """The half that the key's complement is multiplied with would be lost without the word itself."""
    word = np.array([(2**32 - int(chunk_keys()[0]) // 2**32) % 2**32 * 2**32], np.uint64)
    data = np.zeros(64, np.uint8)
    found = set()
    for low in (0, 1, 2, 2**31, 2**32 - 1):
        data[:8] = (word + np.uint64(low)).view(np.uint8)
        found.add(sums(data)[0])
    assert len(found) == 5


def test_other_tensors_are_refused() -> None:
    for tensor, block_bytes in ((torch.zeros(4), 64), (torch.zeros(2, 2, dtype=torch.uint8), 64)):
        with pytest.raises(ValueError, match="flat uint8"):
            block_checksums(tensor, block_bytes)
    with pytest.raises(ValueError, match="blocks"):
        block_checksums(torch.zeros(4, dtype=torch.uint8), 0)

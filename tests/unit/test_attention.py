"""Ragged attention over the slot cache: native against the plain twin, and against torch's own."""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels import reference
from slipstream.kernels.dispatch import NativeKernels

SLOTS, KV_HEADS, DIM, LENGTH = 5, 2, 24, 48


def make_cache(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    keys = torch.randn(SLOTS, KV_HEADS, LENGTH // reference.KEY_BLOCK, DIM, reference.KEY_BLOCK)
    return keys, torch.randn(SLOTS, KV_HEADS, LENGTH, DIM)


@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("heads", [2, 6])
def test_native_equals_reference(window: int, softcap: float, heads: int) -> None:
    keys, values = make_cache(0)
    query = torch.randn(9, heads, DIM)
    slots = torch.tensor([0, 0, 0, 3, 1, 1, 4, 2, 2])
    positions = torch.tensor([4, 5, 6, 0, 46, 47, 20, 11, 12])
    args = (query, keys, values, slots, positions, 0.2, window, softcap)
    torch.testing.assert_close(
        NativeKernels("test").ragged_attention(*args), reference.ragged_attention(*args), atol=2e-6, rtol=1e-5
    )


def test_reference_equals_torch_attention() -> None:
    keys, values = make_cache(1)
    query = torch.randn(LENGTH, 4, DIM)
    slots, positions = torch.full((LENGTH,), 2), torch.arange(LENGTH)
    got = reference.ragged_attention(query, keys, values, slots, positions, DIM**-0.5)
    by_position = keys.transpose(3, 4).flatten(2, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], by_position[2:3], values[2:3], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(got, expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_append_writes_in_place_and_nothing_else() -> None:
    slots, positions = torch.tensor([1, 4, 1]), torch.tensor([0, 47, 3])
    new_keys, new_values = torch.randn(3, KV_HEADS, DIM), torch.randn(3, KV_HEADS, DIM)
    keys, values = make_cache(2)
    expected_keys, expected_values = keys.clone(), values.clone()
    reference.append_kv(expected_keys, expected_values, new_keys, new_values, slots, positions)
    NativeKernels("test").append_kv(keys, values, new_keys, new_values, slots, positions)
    torch.testing.assert_close(keys, expected_keys, atol=0, rtol=0)
    torch.testing.assert_close(values, expected_values, atol=0, rtol=0)
    assert (keys != make_cache(2)[0]).sum() <= 3 * KV_HEADS * DIM


def test_bits_do_not_depend_on_the_batch() -> None:
    keys, values = make_cache(3)
    query = torch.randn(8, 4, DIM)
    slots, positions = torch.arange(8) % SLOTS, torch.arange(8) * 5
    kernels = NativeKernels("test")
    together = kernels.ragged_attention(query, keys, values, slots, positions, 0.3)
    for t in range(8):
        alone = kernels.ragged_attention(query[t : t + 1], keys, values, slots[t : t + 1], positions[t : t + 1], 0.3)
        assert torch.equal(alone[0], together[t])


def test_places_outside_the_cache_are_refused() -> None:
    keys, values = make_cache(4)
    with pytest.raises(ValueError, match="outside the cache"):
        NativeKernels("test").ragged_attention(
            torch.zeros(1, 2, DIM), keys, values, torch.tensor([SLOTS]), torch.tensor([0]), 1.0
        )


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("heads", [2, 6])
def test_bits_do_not_depend_on_instruction_set_or_threads(window: int, heads: int) -> None:
    keys, values = make_cache(4)
    slots = torch.arange(5).repeat_interleave(9)
    positions = torch.tensor([0, 17, 30, 39, 3]).repeat_interleave(9) + torch.arange(9).repeat(5)
    query = torch.randn(45, heads, DIM)
    names = ("plain", "avx2", "avx512")
    best = names.index(NativeKernels("test").context.isa)
    kernels = [NativeKernels("test", isa=name) for name in names[: best + 1]] + [NativeKernels("test", num_threads=3)]
    outputs = [one.ragged_attention(query, keys, values, slots, positions, 0.2, window) for one in kernels]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_what_lies_beyond_a_request_is_never_read_into_it() -> None:
    """Rejected drafts of a model that returned NaN stay in the cache until they are overwritten."""
    keys, values = make_cache(5)
    query, slots, positions = torch.randn(4, 4, DIM), torch.tensor([1, 1, 1, 1]), torch.tensor([8, 9, 10, 11])
    kernels = NativeKernels("test")
    clean = kernels.ragged_attention(query, keys, values, slots, positions, 0.2)
    keys[1, :, 0, :, 12:] = float("nan")
    values[1, :, 12:] = float("nan")
    assert torch.equal(kernels.ragged_attention(query, keys, values, slots, positions, 0.2), clean)
    # A token in a group sees no further than it does alone.
    values[1, :, 11] = float("nan")
    again = kernels.ragged_attention(query, keys, values, slots, positions, 0.2)
    assert torch.equal(again[:3], clean[:3])
    assert again[3].isnan().all()

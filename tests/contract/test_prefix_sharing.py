"""A prompt lies in one slot, and every sample of it reads it there: to the bit what it would be in the sample's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.kernels import reference
from slipstream.kernels.dispatch import KernelChoice, ReferenceKernels
from slipstream.kernels.native_set import NativeKernels
from slipstream.rollout.budget import PriceBudget
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid
from slipstream.trainer.weight_sync import named_weights
from tests.contract.test_tree_verification import packed_tree
from tests.tiny_models import tiny_model

NUM_SAMPLES, MAX_NEW = 8, 40
SIZES = [1, 2, 15, 16, 17, 40, 100]
"""Tokens of prompts."""
KV_HEADS, DIM, BLOCKS = 2, 24, 4

# ---- kernels


def cache(rng: np.random.Generator, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = rng.standard_normal((slots, KV_HEADS, BLOCKS, DIM, reference.KEY_BLOCK), np.float32)
    values = rng.standard_normal((slots, KV_HEADS, BLOCKS * reference.KEY_BLOCK, DIM), np.float32)
    return torch.from_numpy(keys), torch.from_numpy(values)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 50),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.sampled_from([0, 5, 30]),
    st.sampled_from([2, 6]),
    st.sampled_from([1, 2]),
)
def test_reading_elsewhere_is_reading_a_copy(
    seed: int, length: int, widths: list[int], window: int, heads: int, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    keys, values = cache(rng, len(widths) + 1)
    # Slot 0 holds the prefix of all others, whose own places below it hold what must never be read.
    copied = keys.clone(), values.clone()
    plain = ReferenceKernels("test")
    for slot in range(1, len(widths) + 1):
        plain.copy_prefix(*copied, 0, slot, length)
        poison(keys, values, slot, length)
    slots = torch.from_numpy(np.repeat(np.arange(1, len(widths) + 1), widths))
    most = BLOCKS * reference.KEY_BLOCK
    starts = [min(length + int(rng.integers(0, 9)), most - width) for width in widths]
    places = torch.from_numpy(np.concatenate([np.arange(s, s + w) for s, w in zip(starts, widths, strict=True)]))
    assume(bool((places >= length).all()))
    query = torch.from_numpy(rng.standard_normal((len(slots), heads, DIM), np.float32))
    owners = torch.zeros(len(widths) + 1, dtype=torch.int64)
    lengths = torch.full((len(widths) + 1,), length)
    lengths[0] = 0
    native = NativeKernels("test", threads)
    args = slots, places, 0.3, window, 5.0 * (seed % 2), None, None
    expected = native.ragged_attention(query, *copied, *args)
    got = native.ragged_attention(query, keys, values, *args, owners, lengths)
    assert torch.equal(got, expected)
    twin = reference.ragged_attention(query, keys, values, *args, owners, lengths)
    torch.testing.assert_close(got, twin, atol=2e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 18), st.sampled_from([0, 7, 30]))
def test_a_tree_behind_a_prefix_reads_it_elsewhere(seed: int, start: int, size: int, window: int) -> None:
    keys, values = cache(np.random.default_rng(seed), 5)
    tree, length = packed_tree(seed, start, size), seed % (start + 1)
    plain, copied = ReferenceKernels("test"), (keys.clone(), values.clone())
    plain.copy_prefix(*copied, 0, 2, length)
    poison(keys, values, 2, length)
    query = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((size + 2, 4, DIM), np.float32))
    args = tree.slots, tree.places, 0.3, window, 0.0, tree.positions, tree.parents
    owners, lengths = torch.tensor([0, 1, 0, 3, 4]), torch.tensor([0, 0, length, 0, 0])
    got = NativeKernels("test").ragged_attention(query, keys, values, *args, owners, lengths)
    assert torch.equal(got, NativeKernels("test").ragged_attention(query, *copied, *args))
    twin = reference.ragged_attention(query, keys, values, *args, owners, lengths)
    torch.testing.assert_close(got, twin, atol=2e-6, rtol=1e-5)


def poison(keys: torch.Tensor, values: torch.Tensor, slot: int, length: int) -> None:
    """NaN in the first places of a slot."""
    whole, rest = divmod(length, reference.KEY_BLOCK)
    keys[slot, :, :whole] = float("nan")
    if rest:
        keys[slot, :, whole, :, :rest] = float("nan")
    values[slot, :, :length] = float("nan")


def test_prefixes_that_do_not_fit_are_refused() -> None:
    keys, values = cache(np.random.default_rng(0), 2)
    query, slots, places = torch.zeros(1, 2, DIM), torch.tensor([1]), torch.tensor([4])
    args = query, keys, values, slots, places, 0.3, 0, 0.0, None, None
    native = NativeKernels("test")
    for owners, lengths, problem in (
        ([0, 0], [0, 5], "lies in the prefix"),
        ([0, 2], [0, 3], "outside the cache"),
        ([0], [0], "one entry a slot"),
    ):
        with pytest.raises(ValueError, match=problem):
            native.ragged_attention(*args, torch.tensor(owners), torch.tensor(lengths))


# ---- the engine


def group(sizes: list[int], samples: int = NUM_SAMPLES, max_new: int = MAX_NEW) -> list[Request]:
    rng, out = np.random.default_rng(7), []
    for number, size in enumerate(sizes):
        prompt = rng.integers(3, 96, size=size).astype(np.int32)
        for sample in range(samples):
            drawn = Sampling(max_new_tokens=max_new, temperature=0.9, seed=3, stop_token_ids=(2,))
            out.append(Request(request_uid(1, 0, number, sample), f"p{number}", number, prompt, drawn))
    return out


@pytest.fixture(scope="module")
def apart() -> dict[int, Rollout]:
    """What all of SIZES sample alone."""
    return alone(group(SIZES))


def alone(requests: list[Request], kernels: KernelChoice = "auto") -> dict[int, Rollout]:
    """Every request in an engine that has nothing to share."""
    engine, out = TorchEngine(tiny_model("qwen3"), max_len=256, max_live_requests=4, kernels=kernels), {}
    for request in requests:
        engine.submit([request])
        out |= {rollout.request.uid: rollout for rollout in engine.drain(timeout_s=60)}
    assert engine.stats().shared_prompt_tokens == 0
    return out


def same(got: list[Rollout], expected: dict[int, Rollout], atol: float = 0.0) -> None:
    assert {rollout.request.uid for rollout in got} == set(expected)
    for rollout in got:
        want = expected[rollout.request.uid]
        np.testing.assert_array_equal(rollout.tokens, want.tokens)
        np.testing.assert_allclose(rollout.logprobs, want.logprobs, rtol=0, atol=atol)


@pytest.mark.parametrize("num_live", [64, 9, 3, 1])
@pytest.mark.parametrize("max_forward_tokens", [512, 70])
def test_groups_sample_what_each_would_alone(num_live: int, max_forward_tokens: int, apart: dict[int, Rollout]) -> None:
    requests = group(SIZES)
    engine = TorchEngine(
        tiny_model("qwen3"), max_len=256, max_live_requests=num_live, max_forward_tokens=max_forward_tokens
    )
    engine.submit(requests)
    same(engine.drain(timeout_s=60), apart)
    stats = engine.stats()
    assert stats.prefill_tokens == sum(size for size in SIZES if size > 1), "each prompt is computed once"
    assert stats.shared_prompt_tokens + stats.copied_prompt_tokens >= (NUM_SAMPLES - 1) * (sum(SIZES) - len(SIZES))
    if num_live in (1, 64):
        assert stats.copied_prompt_tokens == 0, "with a slot for everybody, and with one for all, nothing is copied"
    assert engine.prefixes._kept == {} == engine.prefixes._readers
    assert engine.cache.prefixes is None
    assert engine.table.num_free == num_live


def test_no_sample_waits_for_a_prompt_that_is_done_in_the_same_pass() -> None:
    requests = group([30, 60], max_new=5)
    engine = TorchEngine(tiny_model("qwen3"), max_len=256, max_live_requests=16)
    engine.submit(requests)
    engine.step()
    assert engine.num_live == 16
    assert engine.stats().generated_tokens == 16
    # A prompt that does not fit the pass is waited for.
    narrow = TorchEngine(tiny_model("qwen3"), max_len=256, max_live_requests=16, max_forward_tokens=40)
    narrow.submit(requests)
    narrow.step()
    assert narrow.num_live < 16
    same(narrow.drain(timeout_s=60), alone(requests))


@pytest.mark.parametrize("num_live", [64, 9])
@pytest.mark.parametrize("branching", [1, 3])
def test_drafts_and_trees_are_verified_behind_a_shared_prompt(
    num_live: int, branching: int, apart: dict[int, Rollout]
) -> None:
    drafter = SuffixDrafter()
    # The samples of one visit, so that siblings' histories branch.
    drafter.publish(0, [HistoryRecord(r.request.prompt_id, 0, uid, r.tokens) for uid, r in apart.items()])
    budget = PriceBudget(16, branching=branching)
    engine = TorchEngine(tiny_model("qwen3"), max_len=256, max_live_requests=num_live, drafter=drafter, budget=budget)
    engine.submit(group(SIZES))
    same(engine.drain(timeout_s=60), apart)
    assert engine.stats().accepted > 0.2 * engine.stats().generated_tokens
    assert engine.stats().shared_prompt_tokens > 0


@pytest.mark.parametrize("num_live", [64, 5])
def test_continued_requests_share_their_prompt(num_live: int, apart: dict[int, Rollout]) -> None:
    requests = [
        replace(request, prefill=apart[request.uid].tokens[: 3 * i % 20])
        for i, request in enumerate(group(SIZES))
        if len(apart[request.uid].tokens) > 20
    ]
    assert len(requests) > 20
    engine = TorchEngine(tiny_model("qwen3"), max_len=256, max_live_requests=num_live)
    engine.submit(requests)
    for rollout in engine.drain(timeout_s=60):
        done, want = len(rollout.request.prefill), apart[rollout.request.uid]
        np.testing.assert_array_equal(rollout.tokens, want.tokens[done:])
        np.testing.assert_array_equal(rollout.logprobs, want.logprobs[done:])
    assert engine.stats().shared_prompt_tokens > 0


@pytest.mark.parametrize("which", [0, 3, 7])
def test_who_reads_a_prompt_outlives_its_owner(which: int) -> None:
    requests = group([50, 20])
    expected = alone(requests)
    engine = TorchEngine(tiny_model("qwen3"), max_len=256, max_live_requests=10)
    engine.submit(requests)
    out = engine.step() + engine.step()
    [aborted] = engine.abort([requests[which].uid])
    # What another request would do to a slot that is free, and more.
    for slot in engine.table._free:
        poison_slot(engine, slot)
    out += engine.drain(timeout_s=60)
    del expected[aborted.request.uid]
    same(out, expected)


@torch.inference_mode()
def poison_slot(engine: TorchEngine, slot: int) -> None:
    for layer in engine.cache.slot_layers:
        for part in layer.stored:
            part[slot] = float("nan")


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_kernels_share_alike(kernels: KernelChoice) -> None:
    requests = group([40, 5], samples=3, max_new=12)
    engine = TorchEngine(tiny_model("qwen3"), max_len=256, kernels=kernels)
    engine.submit(requests)
    # torch's own products and sums round by the batch.
    same(engine.drain(timeout_s=60), alone(requests, kernels), atol=1e-5 if kernels == "reference" else 0.0)
    assert engine.stats().shared_prompt_tokens == 2 * (39 + 4)


@pytest.mark.parametrize("num_live", [64, 9, 3])
def test_kernels_that_cannot_read_elsewhere_get_copies(num_live: int, apart: dict[int, Rollout]) -> None:
    requests = group(SIZES)
    engine = TorchEngine(tiny_model("qwen3"), max_len=256, max_live_requests=num_live)
    engine.prefixes._shares = False
    engine.submit(requests)
    same(engine.drain(timeout_s=60), apart)
    stats = engine.stats()
    assert stats.prefill_tokens == sum(size for size in SIZES if size > 1)
    assert stats.copied_prompt_tokens > 0
    assert engine.prefixes._kept == {} == engine.prefixes._readers
    assert engine.table.num_free == num_live


def scaled(model: torch.nn.Module, factor: float) -> dict[str, torch.Tensor]:
    return {name: tensor * factor for name, tensor in named_weights(model).items()}


@pytest.mark.parametrize("restart", [False, True])
def test_new_weights_are_not_mixed_with_a_prompt_of_the_old(restart: bool) -> None:
    """Samples that are under way go on with what they have, or compute it anew; later ones share nothing old."""
    requests, outs = group([45], samples=12), []
    for sharing in (True, False):
        engine = TorchEngine(tiny_model("qwen3"), max_len=256, max_live_requests=6)
        if not sharing:
            forbid_sharing(engine)
        engine.submit(requests)
        out: list[Rollout] = []
        while engine.stats().steps < 9:
            out += engine.step()
        engine.update_policy(scaled(tiny_model("qwen3"), 1.1), 1)
        if restart:
            engine.recompute_live()
            assert engine.cache.prefixes is None
        out += engine.drain(timeout_s=60)
        outs.append({rollout.request.uid: rollout for rollout in out})
        assert (engine.stats().shared_prompt_tokens > 0) == sharing
    same(list(outs[0].values()), outs[1])


def forbid_sharing(engine: TorchEngine) -> None:
    """Every request prefills for itself."""
    admit: Callable[[Request], int] = engine.prefixes.admit

    def lonely(request: Request) -> int:
        entry = engine.prefixes._entries[request.prompt.tobytes()]
        entry.owner = entry.snapshot = None
        return admit(request)

    engine.prefixes.admit = lonely  # type: ignore[method-assign]
    engine.prefixes.must_wait = lambda request, room: False  # type: ignore[method-assign]

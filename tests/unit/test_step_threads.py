"""The threads of one engine step: same drafts, counts, statistics and errors as one thread, whatever happens."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import DraftBatch
from slipstream.kernels import _native  # type: ignore[attr-defined]

WIDTH = 6
ALPHABET = 4


def arrays(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([token for tokens in sequences for token in tokens], np.int32), np.cumsum([0, *map(len, sequences)])


class Pair:
    """The same calls to a set of one thread and to one of several; every answer must be the same."""

    def __init__(self, threads: int, threads_from: int = 1) -> None:
        self.sets = (
            _native.SuffixIndexSet(threads=1),
            _native.SuffixIndexSet(threads=threads, threads_from=threads_from),
        )
        self.num_drafted = 0

    def publish(self, prompt_id: str, sequences: list[list[int]]) -> None:
        count = len(sequences)
        for index in self.sets:
            index.publish(prompt_id, *arrays(sequences), np.ones(count, np.float32), np.ones(count, np.uint8))
            index.publish_shared(*arrays(sequences))
            index.wait()

    def begin(self, uid: int, prompt_id: str) -> None:
        for index in self.sets:
            index.begin(uid, prompt_id, np.array([0, 1, 2], np.int32))

    def end(self, uid: int) -> None:
        for index in self.sets:
            index.end(uid)

    def extend(self, uids: list[int], tokens: list[list[int]]) -> None:
        for index in self.sets:
            index.extend(np.array(uids, np.int64), *arrays(tokens))

    def compare(self, uids: list[int], limits: np.ndarray, min_prob: np.ndarray, branching: np.ndarray) -> None:
        outs = []
        for index in self.sets:
            out = DraftBatch.empty(len(uids), WIDTH)
            index.propose(
                *(np.array(uids, np.int64), limits, min_prob, branching, out.tokens, out.count, out.source, out.age),
                *(out.match_len, out.probs, out.cells, out.parents),
            )
            outs.append(out)
        one, several = outs
        for name in ("count", "source", "age", "match_len"):
            np.testing.assert_array_equal(getattr(one, name), getattr(several, name), err_msg=name)
        drafted = np.arange(WIDTH) < one.count[:, None]
        for name in ("tokens", "probs", "cells", "parents"):
            got, wanted = getattr(several, name)[drafted], getattr(one, name)[drafted]
            np.testing.assert_array_equal(got, wanted, err_msg=name)
        self.num_drafted += int(one.count.sum())
        assert self.sets[0].stats() == self.sets[1].stats()


def run(pair: Pair, seed: int, num_prompts: int, num_requests: int, num_steps: int) -> None:
    """A random interleaved life of a batch."""
    rng = np.random.default_rng(seed)
    prompts = [f"prompt {i}" for i in range(num_prompts)]
    for prompt_id in prompts[::2]:
        pair.publish(prompt_id, [rng.integers(0, ALPHABET, rng.integers(0, 40)).tolist() for _ in range(3)])
    live: list[int] = []
    for step in range(num_steps):
        while len(live) < num_requests:
            uid = 1000 * step + len(live)
            pair.begin(uid, prompts[rng.integers(num_prompts)])
            live.insert(int(rng.integers(len(live) + 1)), uid)
        rows = len(live)
        limits, branching = rng.integers(0, WIDTH + 1, rows), rng.choice([1, 1, 2, 3], rows)
        min_prob = rng.choice([0.0, 0.1, 0.4], rows)
        pair.compare(live, limits.astype(np.int32), min_prob.astype(np.float32), branching.astype(np.int32))
        pair.extend(live, [rng.integers(0, ALPHABET, rng.integers(0, 5)).tolist() for _ in live])
        if rng.uniform() < 0.2:
            pair.publish(prompts[rng.integers(num_prompts)], [rng.integers(0, ALPHABET, 30).tolist()])
        for uid in [uid for uid in live if rng.uniform() < 0.15]:
            pair.end(uid)
            live.remove(uid)
    for uid in live:
        pair.end(uid)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 40), st.integers(2, 4))
def test_threads_change_nothing(seed: int, num_prompts: int, num_requests: int, threads: int) -> None:
    run(Pair(threads), seed, num_prompts, num_requests, num_steps=8)


@pytest.mark.parametrize(("num_prompts", "num_requests"), [(1, 64), (2, 200), (64, 256), (300, 300)])
def test_threads_change_nothing_in_large_batches(num_prompts: int, num_requests: int) -> None:
    """One prompt for all, which one thread must take; more rows than a block; a prompt for every request."""
    pair = Pair(threads=2)
    run(pair, 1, num_prompts, num_requests, num_steps=12)
    assert pair.num_drafted > 3 * num_requests


def test_batches_below_the_threshold_and_above_it_alternate() -> None:
    pair = Pair(threads=3, threads_from=20)
    for seed, num_requests in enumerate((5, 40, 19, 20)):
        run(pair, seed, 6, num_requests, num_steps=4)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_start_with_the_first_batch_that_is_large_enough() -> None:
    gc.collect()
    before = num_threads()
    index = _native.SuffixIndexSet(threads=4, threads_from=8)
    for uid in range(8):
        index.begin(uid, f"prompt {uid}", np.zeros(0, np.int32))
    propose_ones(index, list(range(7)))
    assert num_threads() == before
    for _ in range(3):
        propose_ones(index, list(range(8)))
        assert num_threads() == before + 3
    del index
    assert num_threads() == before


def message_of(call: Callable[[], None]) -> tuple[type, str]:
    with pytest.raises((ValueError, KeyError)) as caught:
        call()
    return caught.type, str(caught.value)


def test_errors_are_the_same_and_change_nothing() -> None:
    pair = Pair(threads=2)
    uids = list(range(30))
    for uid in uids:
        pair.begin(uid, f"prompt {uid % 5}")
    pair.extend(uids, [[0, 1, 2, 0, 1]] * 30)
    ones = np.ones(31, np.int32)
    calls: list[Callable[[_native.SuffixIndexSet], None]] = [
        lambda index: index.extend(np.array([*uids, 99]), *arrays([[1]] * 31)),
        lambda index: index.extend(np.array([*uids, 7]), *arrays([[1]] * 31)),
        lambda index: index.extend(np.array(uids), *arrays([[1]] * 29 + [[-4]])),
        lambda index: index.extend(np.array(uids), np.zeros(30, np.int32), np.arange(31)[::-1].copy()),
        lambda index: propose_ones(index, [*uids, 99]),
        lambda index: propose_ones(index, [7, *uids]),
        lambda index: index.begin(7, "other", np.zeros(0, np.int32)),
        lambda index: index.end(99),
    ]
    for call in calls:
        before = [index.stats() for index in pair.sets]
        one, several = (message_of(partial(call, index)) for index in pair.sets)
        assert one == several
        assert [index.stats() for index in pair.sets] == before
        pair.compare(uids, 6 * ones[:30], np.zeros(30, np.float32), ones[:30])
    assert pair.num_drafted > 0


def propose_ones(index: _native.SuffixIndexSet, uids: list[int]) -> None:
    rows = len(uids)
    out, ones = DraftBatch.empty(rows, WIDTH), np.ones(rows, np.int32)
    index.propose(
        *(np.array(uids), ones, np.zeros(rows, np.float32), ones, out.tokens, out.count, out.source, out.age),
        *(out.match_len, out.probs, out.cells, out.parents),
    )


def test_an_empty_batch_and_no_threads() -> None:
    pair = Pair(threads=2, threads_from=0)
    none = np.zeros(0, np.int32)
    pair.compare([], none, np.zeros(0, np.float32), none)
    pair.extend([], [])
    with pytest.raises(ValueError, match="threads"):
        _native.SuffixIndexSet(threads=0)

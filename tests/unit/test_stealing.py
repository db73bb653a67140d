"""Queued requests move to idle workers: who gives to whom, and what the engine hands out."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slipstream.drafter.suffix import SuffixDrafter
from slipstream.rollout.budget import FixedBudget
from slipstream.rollout.stealing import Move, plan_moves
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Sampling, request_uid
from tests.tiny_models import tiny_model

MAX_LEN, LIVE = 120, 3


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 12))
def test_queued_requests_go_where_slots_are_free(held: list[int], num_slots: int) -> None:
    moves = plan_moves(held, num_slots)
    after = list(held)
    for move in moves:
        assert move.count > 0
        after[move.source] -= move.count
        after[move.target] += move.count
    queued, free = sum(max(n - num_slots, 0) for n in held), sum(max(num_slots - n, 0) for n in held)
    assert sum(move.count for move in moves) == min(queued, free)
    for before, now in zip(held, after, strict=True):
        # A giver keeps its slots full, a taker starts all that it gets; nobody is both.
        assert num_slots <= now <= before or before <= now <= num_slots
    assert plan_moves(after, num_slots) == []
    assert plan_moves(held, num_slots) == moves


def test_the_longest_queue_gives_to_the_emptiest_worker() -> None:
    assert plan_moves([9, 5, 0], 4) == [Move(0, 2, 4)]
    assert plan_moves([7, 7, 2, 0], 4) == [Move(0, 2, 2), Move(0, 3, 1), Move(1, 3, 3)]
    assert plan_moves([4, 4], 4) == plan_moves([3, 0], 4) == plan_moves([], 4) == []


def make_requests() -> list[Request]:
    """Four prompts with four samples each."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 96, 20 + i).astype(np.int32) for i in range(4)]
    sampling = Sampling(24, seed=3)
    return [
        Request(request_uid(2, 0, group, sample), f"p{group}", group, prompts[group], sampling)
        for group in range(4)
        for sample in range(4)
    ]


def make_engine() -> TorchEngine:
    return TorchEngine(
        tiny_model("qwen3"),
        max_live_requests=LIVE,
        max_len=MAX_LEN,
        drafter=SuffixDrafter(),
        budget=FixedBudget(4),
    )


def test_taken_requests_are_the_last_and_run_elsewhere_once() -> None:
    requests = make_requests()
    whole = make_engine()
    whole.submit(requests)
    expected = {r.request.uid: r.tokens.tolist() for r in whole.drain(60)}
    loaded, idle = make_engine(), make_engine()
    loaded.submit(requests)
    done = loaded.step() + loaded.step()
    taken = loaded.take_queued(5)
    assert [r.uid for r in taken] == [r.uid for r in requests[-5:]]
    idle.submit(taken)
    # What was taken is no longer known there: it may come back.
    [back] = idle.take_queued(1)
    loaded.submit([back])
    done += idle.drain(60) + loaded.drain(60)
    assert sorted(r.request.uid for r in done) == sorted(r.uid for r in requests)
    assert {r.request.uid: r.tokens.tolist() for r in done} == expected
    # Each prompt is computed once wherever it runs; samples of the last two ran in both places.
    per_prompt = {r.prompt_id: len(r.prompt) for r in requests}
    prefilled = loaded.stats().prefill_tokens + idle.stats().prefill_tokens
    assert prefilled == sum(per_prompt.values()) + per_prompt["p2"] + per_prompt["p3"]


def test_what_is_live_stays_and_prefixes_are_dropped_with_the_queue() -> None:
    requests = make_requests()
    engine = make_engine()
    engine.submit(requests)
    engine.step()
    live = engine.num_live
    taken = engine.take_queued(1000)
    assert len(taken) + live == len(requests)
    assert engine.num_unfinished == engine.num_live == live
    assert engine.take_queued(1) == []
    # Nobody is left to copy a prompt: nothing is kept for it.
    assert not engine.prefixes._entries
    assert len(engine.drain(60)) == live

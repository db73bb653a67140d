"""Replays: fluid ones against plain simulation, token ones against the engine's own counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.arms import ARMS
from slipstream.experiments.replay.tokens import replay_tokens
from slipstream.rollout.budget import FixedBudget, OffBudget, PriceBudget
from slipstream.rollout.cost_model import StepCost
from slipstream.rollout.lengths import LengthModel
from slipstream.rollout.replay import H100_7B, Trace, replay, synthetic_trace

COST = StepCost(2.0, 0.1, 0.001, 0.05)


def trace(lengths: list[int], accept: float = 0.0, prompt_tokens: int = 3) -> Trace:
    count = len(lengths)
    return Trace(
        prompt=np.zeros(count, np.int64),
        prompt_tokens=np.full(count, prompt_tokens),
        length=np.array(lengths),
        accept=np.full((count, 1), accept),
        share=np.ones(1),
        history=[np.array([50])],
        cap_tokens=1000,
    )


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_without_drafts_the_replay_is_the_simulation_step_by_step(lengths: list[int], workers: int) -> None:
    """Every request at once on its worker: a step's price, summed over the steps."""
    result = replay(trace(lengths), COST, OffBudget(), num_workers=workers, max_live=99)
    shares = np.arange(len(lengths)) % workers  # equal predictions: dealt in turns
    expected = []
    for worker in range(workers):
        mine = [length for length, share in zip(lengths, shares, strict=True) if share == worker]
        seconds = COST.tok * 3 * len(mine)
        for step in range(max(mine, default=0)):
            live = [length for length in mine if length > step]
            seconds += float(COST.seconds(len(live), sum(3 + step + 0.5 for _ in live), len(live)))
        expected.append(seconds)
    np.testing.assert_allclose(np.sort(result.worker_s), np.sort(expected), rtol=1e-6)
    assert result.rounds == max(lengths)
    assert result.forward_tokens == sum(lengths)


def test_a_fixed_draft_gains_what_a_chain_of_its_length_gains() -> None:
    result = replay(trace([900], accept=0.5), COST, FixedBudget(3))
    gained = 1 + 0.5 + 0.25 + 0.125
    assert result.rounds == np.ceil(900 / gained)
    assert result.drafted == 3 * result.rounds


def test_slots_make_requests_wait() -> None:
    once = replay(trace([100] * 8), COST, OffBudget(), max_live=8)
    twice = replay(trace([100] * 8), COST, OffBudget(), max_live=4)
    assert (once.rounds, twice.rounds) == (100, 200)


@pytest.mark.parametrize("workers", [1, 7, 40])
@pytest.mark.parametrize("name", list(ARMS))
def test_every_policy_ends_every_request(name: str, workers: int) -> None:
    sample = synthetic_trace(12, 4, median_tokens=300, cap_tokens=2000, seed=workers)
    result = replay(sample, H100_7B, ARMS[name](), num_workers=workers, max_live=16)
    assert np.isfinite(result.makespan_s)
    assert result.rounds <= sample.length.sum()
    assert result.accepted <= result.drafted + 1e-6
    if name == "off":
        assert result.drafted == 0


@pytest.mark.parametrize("visits", [0, 3], ids=["cold", "warm"])
@pytest.mark.parametrize("knee", [20.0, 300.0])
def test_the_price_is_never_above_the_other_policies(visits: int, knee: float) -> None:
    cost = StepCost(knee, 0.0, 0.0, 1.0)
    for live in (4, 64, 256):
        totals = dict.fromkeys(ARMS, 0.0)
        for seed in range(3):
            sample = synthetic_trace(live // 4, 4, median_tokens=800, cap_tokens=8000, visits=visits, seed=seed)
            for name, make in ARMS.items():
                totals[name] += replay(sample, cost, make()).makespan_s
        assert totals["price"] <= 1.02 * min(totals.values()), (live, totals)


def test_a_trace_without_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        trace([0])
    with pytest.raises(ValueError, match="accept"):
        trace([5], accept=1.0)


# ---- token by token


def records(seed: int, step: int, count: int = 6) -> list[HistoryRecord]:
    rng = np.random.default_rng(seed)
    text = np.random.default_rng(7).integers(3, 30, 80).astype(np.int32)
    return [HistoryRecord("p", step, 100 * step + i, text[: int(rng.integers(20, 80))]) for i in range(count)]


def run_tokens(policy: object, warm: bool = True) -> tuple[object, list[HistoryRecord]]:
    drafter, texts = SuffixDrafter(), records(2, 2)
    if warm:
        drafter.publish(1, records(1, 1))
        drafter.wait()
    prompts = {"p": np.arange(3, 8, dtype=np.int32)}
    done = replay_tokens(texts, prompts, drafter, policy, COST, LengthModel(), max_tokens=100, max_draft_tokens=16)
    return done, texts


def test_without_drafts_a_token_replay_takes_a_pass_per_token() -> None:
    done, texts = run_tokens(OffBudget())
    assert done.rounds == 1 + max(len(text.tokens) for text in texts)
    assert (done.drafted, done.accepted) == (0, 0)
    assert done.forward_tokens == sum(len(text.tokens) for text in texts)


def test_a_known_text_takes_few_passes_and_less_time() -> None:
    plain, _ = run_tokens(OffBudget())
    for policy in (FixedBudget(8), PriceBudget(16)):
        done, texts = run_tokens(policy)
        assert done.accepted > 0.5 * sum(len(text.tokens) for text in texts)
        assert done.rounds < plain.rounds / 3
        assert done.makespan_s < plain.makespan_s / 2

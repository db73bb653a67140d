"""Plans of micro-batches: every sample once, within the limit, even, and the same number for every learner."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.trainer.micro_plan import Plan, balance, plan_packed, plan_padded, token_cost

lengths_lists = st.lists(st.integers(2, 60), max_size=24)


def check(plan: Plan, lengths: list[int], num_learners: int) -> None:
    assert len(plan) == num_learners
    assert len({len(batches) for batches in plan}) == 1
    assert len(plan[0]) >= 1
    assert sorted(i for batches in plan for batch in batches for i in batch) == list(range(len(lengths)))


@given(lengths_lists, st.integers(8, 200), st.integers(1, 4))
def test_padded_plans(lengths: list[int], max_tokens: int, num_learners: int) -> None:
    plan = plan_padded(lengths, max_tokens, num_learners)
    check(plan, lengths, num_learners)
    for batch in itertools.chain(*plan):
        assert len(batch) <= 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    totals = [sum(lengths[i] for batch in batches for i in batch) for batches in plan]
    assert max(totals) - min(totals) <= max(lengths, default=0)


@given(lengths_lists, st.integers(8, 200), st.integers(1, 4))
def test_packed_plans(lengths: list[int], max_tokens: int, num_learners: int) -> None:
    hidden_size = 4
    plan = plan_packed(lengths, max_tokens, num_learners, hidden_size)
    check(plan, lengths, num_learners)
    costs = [token_cost(length, hidden_size) for length in lengths]
    loads = []
    for batch in itertools.chain(*plan):
        assert len(batch) <= 1 or sum(lengths[i] for i in batch) <= max_tokens
        loads.append(sum(costs[i] for i in batch))
    # Graham's bound for dealing in any order.
    assert max(loads) <= sum(costs) / len(loads) + max(costs, default=0.0) * (1 - 1 / len(loads)) + 1e-6
    # What runs at the same time is alike: no learner's batch is cheaper than anybody's next one.
    rounds = [[sum(costs[i] for i in batches[k]) for batches in plan] for k in range(len(plan[0]))]
    for now, later in itertools.pairwise(rounds):
        assert min(now) >= max(later)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_parts_are_within_four_thirds_of_the_optimum(costs: list[int], num_parts: int) -> None:
    """The oracle tries every way to deal."""
    parts = balance(costs, num_parts)
    best = min(
        max(sum(c for c, p in zip(costs, dealt, strict=True) if p == part) for part in range(num_parts))
        for dealt in itertools.product(range(num_parts), repeat=len(costs))
    )
    assert max(sum(costs[i] for i in part) for part in parts) <= best * (4 / 3 - 1 / (3 * num_parts)) + 1e-9


def test_one_learner_packs_tighter_than_it_pads() -> None:
    lengths = [10, 50, 12, 48, 30, 30]
    assert len(plan_packed(lengths, 60, 1, 64)[0]) == 3
    assert len(plan_padded(lengths, 60, 1)[0]) == 4


def test_attention_weighs_in_where_sequences_are_long() -> None:
    assert token_cost(10, 1000) == pytest.approx(10, rel=1e-3)
    assert token_cost(12_000, 1000) == pytest.approx(24_000)
    # One long sequence costs more than its tokens in short ones: by tokens 4 x 30 would balance 120.
    plan = plan_packed([120, *[30] * 8], 400, 2, 4)
    long = next(batch for batches in plan for batch in batches if 0 in batch)
    assert len(long) == 1


def test_nothing_is_a_plan_too() -> None:
    assert plan_padded([], 10, 2) == plan_packed([], 10, 2, 8) == [[[]], [[]]]

"""What a price is computed from, natively and by the plain twins: the same numbers to the rounding of float32."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import LiveBatch
from slipstream.kernels.native import _native
from slipstream.rollout.acceptance import CURVE_PRIOR_TOKENS, NUM_CURVE_BUCKETS
from slipstream.rollout.budget import HEDGE, MARGIN, PriceBudget, priced
from slipstream.rollout.cost_model import CostModel, StepCost
from slipstream.rollout.lengths import LengthModel, LiveLengths
from slipstream.rollout.price_rows import (
    invert_curve,
    plain_invert_curve,
    plain_round_rates,
    plain_still_there,
    round_rates,
    still_there,
)
from slipstream.rollout.slots import SlotTable

SEEDS = st.integers(0, 2**32 - 1)


def view_of(rng: np.random.Generator, rows: int) -> LiveLengths:
    """A live batch that nothing is known of but its tokens per round."""
    model = LengthModel()
    tables = np.tile(model.table("p"), (rows, 1))
    speed, width = 1.0 + rng.exponential(3.0, rows).astype(np.float32), rng.exponential(5.0, rows)
    queued = float(rng.integers(0, 3) * 7)
    return LiveLengths(model, tables, np.arange(rows), np.zeros(rows, np.int64), speed, queued, None, width, True)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_tokens_per_round_are_those_of_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = SlotTable(12, 8)
    table.rounds[:], table.drafted[:] = rng.integers(0, 200, 12), rng.integers(0, 900, 12)
    table.accepted[...] = rng.integers(0, 300, table.accepted.shape)
    slots, prior = rng.permutation(12)[: rng.integers(0, 13)], (8.0, *rng.exponential(4.0, 2))
    wanted = plain_round_rates(slots, table.rounds, table.drafted, table.accepted, *prior)
    for got, want in zip(round_rates(table, slots, *prior), wanted, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_who_has_left_is_told_as_by_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = rng.permutation(20)[: rng.integers(0, 12)]
    after = [before[np.sort(rng.permutation(len(before))[: rng.integers(0, len(before) + 1)])] for _ in range(3)]
    after[1] = rng.permutation(after[1])
    after[2] = np.append(after[2], 30)
    for uids in after:
        got, wanted = still_there(before, uids), plain_still_there(before, uids)
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            np.testing.assert_array_equal(got, wanted)
    assert still_there(before, after[0]) is not None
    assert still_there(before, after[2]) is None


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, strange=st.sampled_from([None, np.nan, np.inf, -1.0, 0.0]))
def test_a_batch_is_priced_as_by_the_twin(seed: int, strange: float | None) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(0, 9))
    view, chances = view_of(rng, rows), rng.dirichlet(np.ones(rows)) if rows else np.zeros(0)
    if strange is not None and rows:
        chances[rng.integers(rows)] = strange
    base, tok = rng.choice([0.0, 1e-3, 0.2]), rng.choice([0.0, 1e-5, 0.1])
    got = _native.least_probabilities(chances, view.speed, view.width, base, tok, view.num_queued, HEDGE, MARGIN)
    wanted = priced(StepCost(base, 0.0, 0.0, tok), chances, view, rows)
    assert got.dtype == wanted.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_the_budget_prices_by_the_rule_of_the_twin() -> None:
    rng = np.random.default_rng(3)
    view, numbers = view_of(rng, 5), np.full(5, 9, np.int32)
    budget = PriceBudget(16)
    price = budget.price(LiveBatch(np.arange(5), numbers, numbers, numbers), CostModel(40.0), view)
    wanted = priced(CostModel(40.0).cost, budget.last_chances, view, 5)
    np.testing.assert_allclose(price.min_accept_prob, wanted, rtol=1e-6)
    assert 0.0 < wanted.min() < wanted.max()


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, scale=st.sampled_from([0.0, 30.0, 1e6]))
def test_a_reliability_curve_is_inverted_as_by_the_twin(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    count = scale * rng.random(NUM_CURVE_BUCKETS)
    curve = np.stack([count, count * rng.random(NUM_CURVE_BUCKETS), count * rng.random(NUM_CURVE_BUCKETS)])
    asked = np.concatenate([rng.random(20), [0.0, 1.0, 1.5, -0.5, np.nan]]).astype(np.float32)
    got, wanted = invert_curve(curve, asked, CURVE_PRIOR_TOKENS), plain_invert_curve(curve, asked, CURVE_PRIOR_TOKENS)
    assert got.dtype == wanted.dtype == np.float32
    # Where the curve is level its inverse is steep: a rounding of what is asked moves the answer there.
    close = np.isclose(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert close.all(), (asked[~close], got[~close], wanted[~close])

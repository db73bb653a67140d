"""Budget policies: what they price, that no input makes them raise, and the closed form's optimum."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import LiveBatch
from slipstream.rollout.budget import (
    MARGIN,
    BudgetPolicy,
    ChainRate,
    FixedBudget,
    OffBudget,
    PriceBudget,
    chain_price,
    least_probability,
)
from slipstream.rollout.class_budget import ClassBudget
from slipstream.rollout.closed_form import ClosedFormBudget, drafts_for, rounds, solve, total_cost
from slipstream.rollout.cost_model import CostModel, StepCost
from slipstream.rollout.lengths import LengthModel, LiveLengths

H100 = StepCost(7.5e-3, 0.0, 0.0, 2.5e-5)


def live(generated: list[int] | np.ndarray, remaining: int = 1000) -> LiveBatch:
    done = np.asarray(generated, np.int32)
    return LiveBatch(np.arange(len(done)), done, np.full(len(done), remaining, np.int32), done + 10)


def policies() -> list[BudgetPolicy]:
    return [
        OffBudget(),
        FixedBudget(5),
        ClassBudget(),
        ClosedFormBudget(16),
        ClosedFormBudget(16, "published"),
        PriceBudget(16),
        PriceBudget(16, estimates=False),
    ]


def history(lengths: dict[str, list[int]], cap: int = 10**9) -> LengthModel:
    """Two visits of every prompt: the second has an initial class."""
    model = LengthModel()
    for _ in range(2):
        for name, values in lengths.items():
            model.observe([name] * len(values), values, [value >= cap for value in values])
    return model


class Cost(CostModel):
    """A cost model that says what it is told."""

    def __init__(self, step: StepCost) -> None:
        super().__init__()
        self._told = step

    @property
    def cost(self) -> StepCost:
        return self._told


def test_off_and_fixed_are_the_same_for_every_row() -> None:
    for rows in (0, 1, 7):
        assert OffBudget().price(live([1] * rows)).max_draft.tolist() == [0] * rows
        assert FixedBudget(5).price(live([1] * rows)).max_draft.tolist() == [5] * rows


def test_without_knowledge_the_price_asks_for_more_the_fuller_the_batch() -> None:
    budget = PriceBudget(16)
    least = [float(budget.price(live([1] * rows), CostModel(30.0)).min_accept_prob[0]) for rows in (1, 10, 30, 300)]
    wanted = MARGIN * np.array([1 / 31, 10 / 40, 30 / 60, 300 / 330])
    np.testing.assert_allclose(least, np.minimum(wanted, 1.0), rtol=1e-5)
    assert budget.price(live([1, 1])).max_draft.tolist() == [16, 16]


def test_a_draft_token_is_worth_its_price_by_the_rule_of_the_docstring() -> None:
    """A round saved is worth c_base when it is the last request's, and the token's own price in any case."""
    step = StepCost(base=2e-3, live=1e-5, kv=1e-8, tok=4e-5)
    chances = np.array([0.7, 0.3, 0.0])
    np.testing.assert_allclose(least_probability(step, chances, 3), step.tok / (step.base * chances + step.tok))
    # While others wait for a slot, nobody live is known to decide alone.
    crowded = least_probability(step, chances, 3, num_queued=1e9)
    np.testing.assert_allclose(crowded, step.tok / (step.base / 3 + step.tok), rtol=1e-6)


@given(st.floats(0.05, 0.98), st.floats(1.0, 500.0))
@settings(max_examples=60, deadline=None)
def test_the_rules_fixed_point_is_the_best_depth(rate: float, knee: float) -> None:
    """A chain whose tokens are accepted with `rate` each: seconds per token, tried for every depth, are least there."""
    depth = np.arange(33)
    accepted = np.array([rate ** np.arange(1, d + 1) @ np.ones(d) for d in depth])
    seconds = (knee + 1.0 + depth) / (1.0 + accepted)
    chosen = 0
    for _ in range(200):
        least = least_probability(StepCost(knee, 0, 0, 1.0), np.ones(1), 1, 0.0, 1 + accepted[chosen], float(chosen))[0]
        following = min(32, int(np.floor(np.log(least) / np.log(rate) + 1e-9))) if least < 1.0 else 0
        if following == chosen:
            break
        chosen = following
    assert seconds[chosen] <= seconds.min() * 1.01


def test_the_request_expected_to_finish_last_may_draft_riskier_tokens() -> None:
    model = history({"long": [900, 1000, 1100, 950] * 8, "short": [20, 25, 30, 22] * 8})
    view = LiveLengths.of_prompts(model, ["short", "long", "short"])
    least = PriceBudget(16).price(live([5, 5, 5]), CostModel(30.0), view).min_accept_prob
    assert least[1] < 0.08 < 0.15 < least[0] == pytest.approx(least[2])


def test_a_drafter_without_estimates_drafts_as_deep_as_its_measured_rate_pays() -> None:
    budget = PriceBudget(32, estimates=False)
    for _ in range(300):
        budget.observe(np.array([4]), np.array([4]))
    deep = int(budget.price(live([1]), CostModel(30.0)).max_draft[0])
    for _ in range(3000):
        budget.observe(np.array([4]), np.array([0]))
    assert deep == 32
    assert budget.price(live([1] * 40), CostModel(30.0)).max_draft.max() == 0
    # What stopped all drafting is forgotten in time.
    for _ in range(20000):
        budget.observe(np.array([0]), np.array([0]))
    assert budget.price(live([1]), CostModel(30.0)).max_draft[0] > 0


def test_classes_spend_nothing_on_the_short_and_most_on_the_long() -> None:
    lengths = {"a": [10, 12, 14] * 8, "b": [100, 110, 120] * 8, "c": [900, 1000, 1100] * 8}
    view = LiveLengths.of_prompts(history(lengths), ["a", "b", "c", "new"])
    assert ClassBudget((0, 8, 24)).price(live([1, 1, 1, 1]), None, view).max_draft[:3].tolist() == [0, 8, 24]
    # A short prompt's request that outgrew the short and the medium ones is long.
    assert ClassBudget((0, 8, 24)).price(live([400, 1, 1, 1]), None, view).max_draft[0] == 24
    assert ClassBudget((0, 8, 24)).price(live([1]), None, None).max_draft.tolist() == [8]


@given(st.lists(st.integers(0, 100), max_size=9), st.lists(st.integers(1, 40), max_size=4))
def test_widths_are_rounded_down_to_what_the_engine_runs(wanted: list[int], widths: list[int]) -> None:
    got = chain_price(np.array(wanted, np.float64), widths).max_draft.tolist()
    allowed = {0, *widths} if widths else set(wanted)
    assert got == [max(w for w in allowed if w <= want) for want in wanted]


WEIRD = st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30, 1.0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5000), max_size=6),
    st.integers(1, 5000),
    st.sampled_from(["none", "empty", "equal", "capped", "mixed"]),
    st.tuples(WEIRD, WEIRD, WEIRD, WEIRD),
)
def test_no_input_makes_a_policy_raise(
    generated: list[int], remaining: int, known: str, costs: tuple[float, float, float, float]
) -> None:
    lengths = {"none": {}, "empty": {}, "equal": {"p": [7] * 20}, "capped": {"p": [100] * 20}}
    model = history(lengths.get(known, {"p": [1, 50, 5000], "q": [3]}), cap=100)
    batch = live(generated, remaining)
    view = None if known == "none" else LiveLengths.of_prompts(model, ["p", "q", "r", "p", "p", "p"][: len(generated)])
    if view is not None and len(generated):
        view.speed[0] = 1.0
    for policy in policies():
        for cost in (None, CostModel(), Cost(StepCost(*costs))):
            with np.errstate(all="ignore"):
                price = policy.price(batch, cost, view)
            assert len(price.max_draft) == len(price.min_accept_prob) == len(batch)
            assert ((price.max_draft >= 0) & (price.max_draft <= 24)).all()
            assert ((price.min_accept_prob >= 0) & (price.min_accept_prob <= 1)).all(), (policy, costs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), unique=True, max_size=5), min_size=2, max_size=8))
def test_a_batch_may_change_in_any_way_from_step_to_step(batches: list[list[int]]) -> None:
    model = history({f"p{i}": [10 * 2**i] * 4 for i in range(7)})
    budgets = policies()
    for uids in batches:
        ones = np.ones(len(uids), np.int32)
        view = LiveLengths.of_prompts(model, [f"p{uid}" for uid in uids])
        for budget in budgets:
            assert len(budget.price(LiveBatch(np.array(uids), ones, ones * 500, ones), None, view).max_draft) == len(
                uids
            )
            if isinstance(budget, PriceBudget) and uids:
                assert budget.last_chances.sum() == pytest.approx(1.0)


def test_free_tokens_and_free_passes_have_a_price() -> None:
    free_tokens = least_probability(StepCost(1.0, 0.0, 0.0, 0.0), np.array([0.5, 0.5]), 2)
    free_passes = least_probability(StepCost(0.0, 0.0, 0.0, 1.0), np.array([0.5, 0.5]), 2)
    assert free_tokens.tolist() == [0.0, 0.0]
    assert free_passes.tolist() == [1.0, 1.0]


def test_the_chain_rate_counts_what_was_judged() -> None:
    rate = ChainRate(prior=0.5)
    rate.observe(np.array([4, 4, 0]), np.array([4, 1, 0]))
    assert rate.rate == pytest.approx((5 + 8) / (6 + 16))


# ---- the closed form


@pytest.mark.parametrize("count", [1, 16, 256])
@pytest.mark.parametrize("k", [0.4, 0.75, 1.0])
def test_the_corrected_form_is_the_optimum_of_its_programme(count: int, k: float) -> None:
    rng = np.random.default_rng(count)
    length = np.minimum(rng.lognormal(7.5, 1.0, count), 16384.0)
    alpha, share = np.full(count, 0.8), np.full(count, k)
    best = min(
        total_cost(H100, length, alpha, share, drafts_for(target, length, alpha, share))
        for target in np.linspace(length.max() * (1 - k) + 1e-3 * length.max(), length.max(), 4000)
    )
    target = solve(H100, length, alpha, share)
    drafts = drafts_for(target, length, alpha, share)
    assert total_cost(H100, length, alpha, share, drafts) <= best * 1.0005
    np.testing.assert_allclose(rounds(length, alpha, share, drafts).max(), target, rtol=1e-6)


def test_the_published_form_misses_its_own_target_and_the_corrected_one_does_not() -> None:
    """The numbers of the report on the paper: l = 8000, alpha = 1.3, k = 0.7, N = 4500."""
    args = np.array([8000.0]), np.array([1.3]), np.array([0.7])
    published, corrected = drafts_for(4500.0, *args, "published"), drafts_for(4500.0, *args)
    np.testing.assert_allclose([published[0], corrected[0]], [2250, 6036], rtol=1e-3)
    np.testing.assert_allclose([rounds(*args, published)[0], rounds(*args, corrected)[0]], [6285, 4500], rtol=1e-3)


def test_where_tokens_cost_too_much_nothing_is_drafted() -> None:
    length, one = np.full(50, 100.0), np.ones(50)
    dear = StepCost(1.0, 0.0, 0.0, 10.0)
    assert drafts_for(solve(dear, length, one, one * 0.5), length, one, one * 0.5).max() == pytest.approx(0.0)


def test_the_closed_form_gives_long_requests_more() -> None:
    model = history({"long": [900, 1000, 1100, 950] * 4, "short": [20, 25, 30, 22] * 4})
    view = LiveLengths.of_prompts(model, ["short", "long"])
    budget = ClosedFormBudget(32).price(live([1, 1]), CostModel(300.0), view).max_draft
    assert budget[1] > budget[0] == 0


@pytest.mark.slow
def test_solving_for_4096_requests_is_quick() -> None:
    rng = np.random.default_rng(0)
    model = history({f"p{i}": (rng.lognormal(5, 1, 16) + 1).astype(int).tolist() for i in range(256)})
    view = LiveLengths.of_prompts(model, [f"p{i % 256}" for i in range(4096)])
    seconds = []
    for _ in range(9):
        budget, batch = PriceBudget(32), live(rng.integers(1, 100, 4096), 4000)
        started = time.perf_counter()
        budget.price(batch, CostModel(), view)
        seconds.append(time.perf_counter() - started)
    assert np.median(seconds) < 0.01  # five times the figure on a quiet machine

"""The cost of a step: fitted, robust, forgetful, and silent until it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.rollout.cost_model import CostModel, StepCost, nonnegative_least_squares

TRUE = StepCost(base=1.5e-3, live=2e-5, kv=1e-7, tok=5e-5)


def steps(count: int, cost: StepCost = TRUE, noise: float = 0.1, seed: int = 0) -> Iterator[tuple]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        live = int(rng.integers(1, 33))
        kv, tokens = live * int(rng.integers(20, 2000)), live + int(rng.integers(0, 4 * live + 1))
        yield live, kv, tokens, float(cost.seconds(live, kv, tokens)) * rng.lognormal(0, noise)


def fitted(observations: Iterator[tuple] | list[tuple], **options: object) -> CostModel:
    model = CostModel(**options)
    for step in observations:
        model.observe(*step)
    model.fit()
    return model


def assert_close(found: StepCost, share: float) -> None:
    for live, tokens in ((1, 1), (1, 17), (16, 16), (32, 128)):
        args = live, live * 500, tokens
        assert found.seconds(*args) == pytest.approx(TRUE.seconds(*args), rel=share)


def test_the_fit_finds_what_steps_cost() -> None:
    model = fitted(steps(2000))
    assert model.trusted
    assert_close(model.cost, 0.05)
    assert model.cost.tok == pytest.approx(TRUE.tok, rel=0.15)
    assert model.cost.base == pytest.approx(TRUE.base, rel=0.1)
    assert model.metrics()["das/cost_relative_error"] == pytest.approx(0.1, rel=0.5)


def test_hiccups_move_nothing() -> None:
    hit = [(a, b, c, s * 40 if i % 50 == 20 else s) for i, (a, b, c, s) in enumerate(steps(2000))]
    assert_close(fitted(hit).cost, 0.1)


def test_what_is_older_fades() -> None:
    model = fitted(steps(500, StepCost(3e-3, 4e-5, 2e-7, 1e-4)))
    for _ in range(200):
        model.fade()
    for step in steps(500):
        model.observe(*step)
    model.fit()
    assert_close(model.cost, 0.1)


def test_before_it_knows_it_says_so_and_uses_the_prior() -> None:
    model = CostModel(knee_tokens=70.0)
    assert not model.trusted
    assert model.cost.knee_tokens == 70.0
    for step in steps(20):
        model.observe(*step)
    model.fit()
    assert not model.trusted
    assert model.cost.knee_tokens == 70.0
    # All steps alike: many, and still nothing is known of what a token costs.
    assert not fitted([(8, 800, 8, 2e-3 * (1 + 0.3 * (i % 2))) for i in range(500)]).trusted


def test_where_nothing_tells_tokens_from_requests_the_token_is_dear() -> None:
    """Without drafts a request is a token: the price must not take drafts for free."""
    rng = np.random.default_rng(0)
    lives = rng.integers(1, 33, 600).tolist()
    model = fitted([(n, 0, n, 1e-3 + 5e-5 * n) for n in lives])
    assert model.cost.tok == pytest.approx(5e-5, rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_measurement_that_is_no_time_is_left_out(seconds: float) -> None:
    model = fitted(steps(100))
    before = model.to_arrays()
    model.observe(4, 100, 8, seconds)
    after = model.to_arrays()
    assert after["products"] == before["products"]
    assert after["totals"][5] == before["totals"][5] + 1


def test_tokens_are_counted_as_the_engine_runs_them() -> None:
    model = CostModel(buckets=[16, 4, 64])
    assert [model.rounded(n) for n in (1, 4, 5, 16, 63, 64, 65)] == [4, 4, 16, 16, 64, 64, 65]
    padded = [(live, kv, tokens, TRUE.base + TRUE.tok * model.rounded(tokens)) for live, kv, tokens, _ in steps(600)]
    assert fitted(padded, buckets=[4, 16, 64]).metrics()["das/cost_relative_error"] < 0.01


def test_models_of_workers_add_up_and_survive_a_checkpoint() -> None:
    observations = list(steps(900))
    whole, part = fitted(observations[:300]), fitted(observations[:300])
    before = part.copy()
    for step in observations[300:]:
        part.observe(*step)
    whole.add(part.minus(before))
    np.testing.assert_allclose(whole.products, part.products, rtol=1e-9)
    again = CostModel.from_arrays(json.loads(json.dumps(whole.to_arrays())))
    assert again.cost == whole.cost
    assert again.trusted
    other = CostModel(knee_tokens=9.0, buckets=[7])
    other.replace(whole)
    assert other.cost.seconds(4, 400, 9) == pytest.approx(whole.cost.seconds(4, 400, 9), rel=1e-6)
    assert other.rounded(5) == 7
    for broken in ({"products": [1.0]}, {"targets": [float("nan")] * 4}, {"totals": [-1.0] * 6}):
        with pytest.raises(ValueError, match=r"cost: .*allowed"):
            CostModel.from_arrays(whole.to_arrays() | broken)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_least_squares_are_nonnegative_and_least(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random((rows + 4, 4)) * [1, 10, 1000, 50], rng.normal(size=rows + 4)
    found = nonnegative_least_squares(a.T @ a, a.T @ b)
    if found is None:
        return
    assert (found >= 0).all()
    best = float(((a @ found - b) ** 2).sum())
    for _ in range(200):
        other = np.maximum(found * rng.lognormal(0, 0.3, 4) + rng.normal(0, 1e-3, 4), 0.0)
        # The ridge may cost a little of the fit.
        assert best <= float(((a @ other - b) ** 2).sum()) * 1.05 + 1e-6

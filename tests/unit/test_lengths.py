"""Response lengths: hazards with censoring, back-off, classes, and who finishes last."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.rollout.finish_last import LastCalibration, finish_last, plain_finish_last
from slipstream.rollout.lengths import (
    GROWTH,
    LONG,
    MEDIUM,
    NUM_BINS,
    SHORT,
    UNKNOWN,
    LengthModel,
    LiveLengths,
    bin_of,
    cumulative,
    hazards,
)

NOTHING = np.zeros(NUM_BINS)


def survival(hazard: np.ndarray, tokens: float) -> float:
    return float(np.exp(-cumulative(hazard)[bin_of(np.array([tokens]))[0]]))


def model_of(lengths: dict[str, list[int]], cap: int = 10**9, visits: int = 2) -> LengthModel:
    model = LengthModel()
    for _ in range(visits):
        for name, values in lengths.items():
            model.observe([name] * len(values), values, [value >= cap for value in values])
    return model


def test_bins_cover_every_length() -> None:
    edges = np.floor(GROWTH ** np.arange(1, NUM_BINS)) + 1
    assert bin_of(np.array([0, 1]))[1] == bin_of(np.array([0, 1]))[0] == 0
    assert (np.diff(bin_of(np.unique(edges))) >= 1).all()
    assert bin_of(np.array([10**9]))[0] == NUM_BINS - 1


def test_survival_with_censoring_is_that_of_kaplan_and_meier() -> None:
    """Six responses, two of them cut: the product over the lengths at which some ended of 1 - ended / at risk."""
    lengths = np.array([4, 10, 30, 30, 90, 90])
    cut = np.array([False, False, False, True, True, False])
    found = hazards(lengths, cut, NOTHING, weight=0.0 + 1e-12)
    expected = {5: 5 / 6, 20: 5 / 6 * 4 / 5, 50: 5 / 6 * 4 / 5 * 3 / 4, 200: 5 / 6 * 4 / 5 * 3 / 4 * 1 / 2}
    for tokens, share in expected.items():
        assert survival(found, tokens) == pytest.approx(share, rel=1e-3)
    # Taken for finished, the cut ones would make every response look shorter.
    assert survival(hazards(lengths, np.zeros(6, bool), NOTHING, weight=1e-12), 200) < 0.01


def test_an_unknown_prompt_has_everybodys_lengths_and_a_known_one_its_own() -> None:
    model = model_of({"short": [20] * 32, "long": [900] * 32})
    view = LiveLengths.of_prompts(model, ["short", "new", "long"])
    left = view.expected_remaining(np.ones(3, np.int32), np.full(3, 5000))
    assert left[0] < 100 < left[1] < left[2]
    assert 600 < left[2] < 1400


def test_a_response_that_outgrew_its_prompt_is_expected_to_go_on() -> None:
    view = LiveLengths.of_prompts(model_of({"short": [20] * 32, "long": [900] * 32}), ["short", "short"])
    left = view.expected_remaining(np.array([1, 200]), np.full(2, 5000))
    assert left[1] > 5 * left[0]


def test_classes_by_majority_and_their_update_while_decoding() -> None:
    model = model_of({"a": [10, 12, 900], "b": [100, 110, 120], "c": [900, 1000, 1100]})
    assert [model.initial_class(name) for name in ("a", "b", "c", "new")] == [SHORT, MEDIUM, LONG, UNKNOWN]
    low, high = model.thresholds
    assert 12 <= low <= 110 <= 120 <= high <= 900
    early = model.class_probabilities(np.array([SHORT]), np.array([1]))[0]
    late = model.class_probabilities(np.array([SHORT]), np.array([500]))[0]
    np.testing.assert_allclose(early.sum(), 1.0, rtol=1e-5)
    # One in three of the short prompt's responses is long: once past 500 tokens that is what it must be.
    assert early.argmax() == SHORT
    assert late.argmax() == LONG
    assert late[SHORT] == pytest.approx(0.0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10**6), st.booleans()), max_size=30),
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 10**5), st.integers(1, 10**5)), min_size=1, max_size=8),
    st.integers(0, 2**32 - 1),
)
def test_any_history_gives_probabilities(
    seen: list[tuple[str, int, bool]], rows: list[tuple[str, int, int]], seed: int
) -> None:
    model = LengthModel()
    model.observe([n for n, _, _ in seen], [length for _, length, _ in seen], [cut for _, _, cut in seen])
    view = LiveLengths.of_prompts(model, [name for name, _, _ in rows])
    generated, left = np.array([g for _, g, _ in rows]), np.array([r for _, _, r in rows])
    view.speed[:] = np.random.default_rng(seed).uniform(1.0, 20.0, len(rows))
    chances = finish_last(view, generated, left)
    np.testing.assert_allclose(chances, plain_finish_last(view, generated, left), atol=2e-3)
    assert ((chances >= 0) & (chances <= 1)).all()
    assert chances.sum() == pytest.approx(1.0)
    classes = view.model.class_probabilities(view.initial, generated)
    np.testing.assert_allclose(classes.sum(axis=1), 1.0, atol=1e-4)
    expected = view.expected_remaining(generated, left)
    assert ((expected >= 1) & (expected <= np.maximum(left, 1))).all()
    again = LengthModel.from_arrays(json.loads(json.dumps(model.to_arrays())))
    assert again.to_arrays() == model.to_arrays()
    assert again.thresholds == model.thresholds


@pytest.mark.parametrize("known", [{}, {"p": [50] * 40}, {"p": [1000] * 40}], ids=["empty", "equal", "at the cap"])
def test_requests_that_nothing_tells_apart_share_the_chance(known: dict[str, list[int]]) -> None:
    view = LiveLengths.of_prompts(model_of(known, cap=1000), ["p"] * 5)
    np.testing.assert_allclose(finish_last(view, np.full(5, 30), np.full(5, 970)), 0.2, rtol=1e-5)


def test_the_chance_to_finish_last_is_that_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    model = model_of({f"p{i}": (rng.lognormal(4 + i / 4, 0.4, 16) + 1).astype(int).tolist() for i in range(8)})
    view = LiveLengths.of_prompts(model, [f"p{i}" for i in range(8)])
    view.speed[:] = [1, 1, 1, 1, 1, 2, 1, 3]
    generated, left = np.full(8, 20), np.full(8, 3000)
    chances = finish_last(view, generated, left)
    grid = np.arange(1, 3001)
    ends = view.finished_within(generated, left, np.tile(grid, (8, 1)))
    draws = rng.random((20000, 8))
    rounds_left = np.stack([np.searchsorted(ends[i], draws[:, i]) / view.speed[i] for i in range(8)], axis=1)
    simulated = np.bincount(rounds_left.argmax(axis=1), minlength=8) / 20000
    np.testing.assert_allclose(chances, simulated, atol=0.03)


def test_every_worker_has_a_last_request_of_its_own() -> None:
    model = model_of({"a": [10, 20, 30], "b": [200, 300, 400]})
    names = ["a", "b", "b", "a", "a"]
    view = LiveLengths.of_prompts(model, names)
    alone = [
        finish_last(LiveLengths.of_prompts(model, part), np.full(len(part), 5), np.full(len(part), 900))
        for part in (names[:2], names[2:])
    ]
    view.owner = np.array([0, 0, 3, 3, 3])
    together = finish_last(view, np.full(5, 5), np.full(5, 900))
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-6)


def test_calibration_compares_the_estimates_with_who_was_last() -> None:
    measured = LastCalibration()
    for _ in range(10):
        measured.note(np.array([1, 2]), np.array([0.9, 0.1]))
        measured.settle(np.array([1]))
    metrics = measured.metrics()
    assert metrics["das/last_brier"] == pytest.approx(0.01)
    assert metrics["das/last_calibration_error"] == pytest.approx(0.1)
    assert metrics["das/last_reliability/95"] == 1.0
    measured.note(np.array([1, 2]), np.array([0.9, 0.1]))
    measured.drop()
    measured.settle(np.array([2]))
    assert measured.metrics() == metrics
    assert LastCalibration().metrics() == {}


@pytest.mark.parametrize(
    "broken",
    [
        {"prompts": ["a"], "history": [], "recent": []},
        {"prompts": ["a"], "history": [[0]], "recent": []},
        {"prompts": [], "history": [], "recent": [[7, 3]]},
        {"prompts": ["a"], "history": [["x"]], "recent": []},
    ],
    ids=["missing", "zero", "class", "text"],
)
def test_a_broken_checkpoint_is_named(broken: dict) -> None:
    with pytest.raises(ValueError, match=r"lengths: .*allowed"):
        LengthModel.from_arrays(broken)

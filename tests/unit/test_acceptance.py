"""Measured acceptance: the cells, one step against a plain loop, shrinkage, sums, and what the estimates are worth."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import SOURCE_HISTORY, SOURCE_NAMES
from slipstream.drafter.calibration import (
    CELL_SHAPE,
    NUM_CELLS,
    NUM_WEIGHT_BUCKETS,
    SOURCE_CLASSES,
    cell,
    source_class,
)
from slipstream.kernels import _native  # type: ignore[attr-defined]
from slipstream.rollout.acceptance import NUM_CURVE_BUCKETS, PRIOR, AcceptanceModel, calibrates_after

WIDTH = 4
probabilities_or_worse = st.one_of(st.floats(-0.5, 1.5, width=32), st.just(math.nan), st.sampled_from([0.0, 0.1, 1.0]))
tokens = st.tuples(st.integers(-1, 5), probabilities_or_worse)
drafts = st.lists(tokens, min_size=WIDTH, max_size=WIDTH)
rows = st.tuples(drafts, st.integers(0, WIDTH), st.floats(0, 1), st.booleans())
Row = tuple[list[tuple[int, float]], int, float, bool]


def step_of(batch: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    drafted = np.array([row[1] for row in batch], np.int32)
    return (
        np.array([[cell for cell, _ in row[0]] for row in batch], np.int16).reshape(-1, WIDTH),
        np.array([[prob for _, prob in row[0]] for row in batch], np.float32).reshape(-1, WIDTH),
        drafted,
        np.array([round(row[1] * row[2]) for row in batch], np.int32),
        np.array([row[3] for row in batch], np.bool_),
    )


def observed(*step: np.ndarray) -> AcceptanceModel:
    model = AcceptanceModel()
    model.observe(*step)
    return model


def learned(class_index: int, match_len: int, weight: float, seen: int, accepted: int) -> AcceptanceModel:
    """A model that saw `seen` one-token drafts of one cell."""
    cells = np.full((seen, 1), cell(class_index, match_len, weight), np.int16)
    kept = (np.arange(seen) < accepted).astype(np.int32)
    return observed(cells, np.full((seen, 1), 0.5, np.float32), np.ones(seen, np.int32), kept, np.zeros(seen, bool))


def assert_same(one: AcceptanceModel, other: AcceptanceModel) -> None:
    for name, values in one.to_arrays().items():
        np.testing.assert_allclose(values, other.to_arrays()[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_the_cells_are_those_of_the_native_index() -> None:
    assert math.prod(CELL_SHAPE) == NUM_CELLS == _native.NUM_CELLS <= np.iinfo(np.int16).max
    edges = np.arange(0, NUM_WEIGHT_BUCKETS + 1, dtype=np.float32) / NUM_WEIGHT_BUCKETS
    weights = np.concatenate([edges, np.nextafter(edges, np.float32(-1)), np.nextafter(edges, np.float32(2))])
    classes = [source_class(source, age) for source in range(1, len(SOURCE_NAMES)) for age in range(10)]
    found = set()
    for place in product(classes, (*range(45), 1000), weights.tolist()):
        found.add(cell(*place))
        assert cell(*place) == _native.calibration_cell(*place), place
    assert found == set(range(NUM_CELLS))
    with pytest.raises(ValueError, match="source class"):
        _native.calibration_cell(len(SOURCE_CLASSES), 1, 0.5)


def native_draft(index: _native.SuffixIndexSet, uid: int) -> tuple[int, int, int, list[float], list[int]]:
    """Source, age, match length, path probabilities and cells."""
    tokens, probs, cells = np.zeros((1, 8), np.int32), np.zeros((1, 8), np.float32), np.zeros((1, 8), np.int16)
    count, source, age, match_len = (np.zeros(1, kind) for kind in (np.int32, np.int8, np.int32, np.int32))
    limit, chain, none = np.full(1, 8, np.int32), np.ones(1, np.int32), np.zeros(1, np.float32)
    rest = (match_len, probs, cells, np.zeros((1, 8), np.int16))
    index.propose(np.array([uid]), limit, none, chain, tokens, count, source, age, *rest)
    n = int(count[0])
    return int(source[0]), int(age[0]), int(match_len[0]), probs[0, :n].tolist(), cells[0, :n].tolist()


def native_index(age: int) -> _native.SuffixIndexSet:
    """The request i has something to draft from source i alone."""
    index = _native.SuffixIndexSet(min_match=2, escape=0.3)
    history = np.array([1, 2, 3, 4, 5, 6, 1, 2, 8], np.int32)
    index.publish("history", history, np.array([0, 6, 9]), np.array([2, 1], np.float32), np.full(2, age, np.uint8))
    index.publish_shared(np.array([21, 22, 23, 24], np.int32), np.array([0, 4]))
    index.wait()
    texts: tuple[list[int], ...] = ([], [*range(1, 10), 1, 2], [5, 6], [9, 1, 2], [5, 6, 7], [21, 22])
    for uid, name in enumerate(("sibling", "self", "sibling", "history", "prompt", "shared")):
        index.begin(uid, name, np.array([5, 6, 7, 8] if name == "prompt" else [], np.int32))
        index.extend(np.array([uid]), np.array(texts[uid], np.int32), np.array([0, len(texts[uid])]))
    index.extend(np.array([0]), np.array([5, 6, 7], np.int32), np.array([0, 3]))
    return index


@pytest.mark.parametrize("age", range(1, 8))
def test_drafts_bear_the_cells_of_their_source_age_match_and_weight(age: int) -> None:
    index = native_index(age)
    for uid in range(1, len(SOURCE_NAMES)):
        source, got_age, match_len, probs, cells = native_draft(index, uid)
        assert source == uid
        assert got_age == (age if uid == SOURCE_HISTORY else 0)
        path = 1.0
        for i, prob in enumerate(probs):
            assert cells[i] == cell(source_class(source, got_age), match_len + i, prob / path)
            path = prob


def test_measured_probabilities_replace_the_relative_weights_of_drafts() -> None:
    index = native_index(2)
    _, _, _, raw, cells = native_draft(index, SOURCE_HISTORY)
    table = np.random.default_rng(0).uniform(0.1, 0.9, NUM_CELLS).astype(np.float32)
    index.calibrate(table)
    _, _, _, measured, same_cells = native_draft(index, SOURCE_HISTORY)
    assert len(raw) == 4
    assert same_cells == cells
    np.testing.assert_allclose(measured, np.cumprod(table[cells]), rtol=1e-5)
    for wrong in (table[:-1], np.full(NUM_CELLS, 1.5, np.float32), np.full(NUM_CELLS, np.nan, np.float32)):
        with pytest.raises(ValueError):
            index.calibrate(wrong)
    assert native_draft(index, SOURCE_HISTORY)[3] == measured


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(rows, max_size=5), min_size=1, max_size=3))
def test_observing_equals_a_plain_loop(steps: list[list[Row]]) -> None:
    model = AcceptanceModel()
    seen, accepted, curve = np.zeros(NUM_CELLS), np.zeros(NUM_CELLS), np.zeros((3, NUM_CURVE_BUCKETS))
    squared_error = 0.0
    for batch in steps:
        step = step_of(batch)
        model.observe(*step)
        for cells, probs, drafted, num_kept, ended in zip(*(part.tolist() for part in step), strict=True):
            for j in range(drafted):
                kept = j < num_kept
                if (kept or (j == num_kept and not ended)) and cells[j] >= 0:
                    seen[cells[j]] += 1
                    accepted[cells[j]] += kept
                if (kept or not ended) and not math.isnan(probs[j]):
                    estimate = min(max(probs[j], 0.0), 1.0)
                    curve[:, min(int(estimate * NUM_CURVE_BUCKETS), NUM_CURVE_BUCKETS - 1)] += (1, estimate, kept)
                    squared_error += (estimate - kept) ** 2
    np.testing.assert_array_equal(model.seen, seen)
    np.testing.assert_array_equal(model.accepted, accepted)
    np.testing.assert_allclose(model.curve, curve, atol=1e-9)
    assert model.squared_error == pytest.approx(squared_error)


@settings(max_examples=80, deadline=None)
@given(st.lists(rows, min_size=1, max_size=5))
def test_what_was_not_observed_changes_nothing(batch: list[Row]) -> None:
    """Cells after the first rejection, and everything after the draft or the end of the response."""
    cells, probs, drafted, accepted, ended = step_of(batch)
    column = np.arange(WIDTH)
    open_until = np.where(ended, accepted, drafted)[:, None]
    blind_cells = np.where(column < np.minimum(open_until, accepted[:, None] + 1), cells, 77).astype(np.int16)
    blind_probs = np.where(column < open_until, probs, np.float32(0.77))
    one = observed(cells, probs, drafted, accepted, ended)
    assert_same(one, observed(blind_cells, blind_probs, drafted, accepted, ended))
    assert one.seen[77] == 0.0


@settings(max_examples=80, deadline=None)
@given(st.lists(rows, max_size=5), st.lists(rows, max_size=5))
def test_adding_is_observing_both(first: list[Row], second: list[Row]) -> None:
    both = observed(*step_of(first))
    both.observe(*step_of(second))
    summed = observed(*step_of(first))
    summed.add(observed(*step_of(second)))
    assert_same(both, summed)
    probabilities = both.probabilities()
    assert probabilities.shape == (NUM_CELLS,)
    assert ((probabilities >= 0.0) & (probabilities <= 1.0)).all()


def test_without_data_the_prior_counts_and_with_much_the_measured_share() -> None:
    fresh = AcceptanceModel().probabilities().reshape(CELL_SHAPE)
    np.testing.assert_allclose(fresh, PRIOR, rtol=1e-6)
    # More weight and more context never say less; a prompt's own history says more than what is in flight.
    assert (np.diff(fresh, axis=2) >= 0.0).all()
    assert (fresh[:, 0] < fresh[:, -1]).all()
    assert (fresh[0] < fresh[4]).all()
    at = cell(4, 3, 0.9)
    gaps = [abs(learned(4, 3, 0.9, n, n // 4).probabilities()[at] - 0.25) for n in (4, 40, 400, 40_000)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3
    with pytest.raises(ValueError, match="prior_weight"):
        AcceptanceModel(prior_weight=0.0)


def test_a_rare_cell_leans_on_the_other_match_lengths_of_its_source() -> None:
    learnt = learned(4, 3, 0.9, 10_000, 2_000).probabilities().reshape(CELL_SHAPE)
    bucket = cell(0, 0, 0.9)
    # All of them are as much less than their prior as the one that was observed.
    np.testing.assert_allclose(learnt[4, :, bucket] / PRIOR[4, :, bucket], 0.2 / PRIOR[4, 2, bucket], rtol=1e-2)
    untouched = AcceptanceModel().probabilities().reshape(CELL_SHAPE)
    learnt[4, :, bucket] = untouched[4, :, bucket]
    np.testing.assert_array_equal(learnt, untouched)


def test_what_is_old_fades() -> None:
    model = learned(0, 5, 0.5, 1000, 1000)
    before = model.reliability()
    for _ in range(3):
        model.fade(0.5)
    assert model.seen.sum() == model.accepted.sum() == model.curve[0].sum() == 125
    assert model.reliability() == [before[0] | {"tokens": 125.0}]
    model.add(learned(0, 5, 0.5, 1000, 0))
    assert model.probabilities()[cell(0, 5, 0.5)] == pytest.approx(125 / 1125, abs=0.02)


def test_metrics_and_reliability_are_those_of_the_curve() -> None:
    assert AcceptanceModel().metrics() == {}
    assert AcceptanceModel().reliability() == []
    probs = np.array([[0.25], [0.25], [0.85], [0.85]], np.float32)
    ones = np.ones(4, np.int32)
    model = observed(np.zeros((4, 1), np.int16), probs, ones, np.array([0, 1, 1, 1], np.int32), np.zeros(4, bool))
    low, high = model.reliability()
    assert low == pytest.approx({"estimate": 0.25, "accepted": 0.5, "tokens": 2.0})
    assert high == pytest.approx({"estimate": 0.85, "accepted": 1.0, "tokens": 2.0})
    brier = (0.25**2 + 0.75**2 + 2 * 0.15**2) / 4
    metrics = {"calibration_error": 0.2, "brier": brier, "reliability/25": 0.5, "reliability/85": 1.0}
    metrics |= {"reliability_tokens/25": 2.0, "reliability_tokens/85": 2.0}
    assert model.metrics() == pytest.approx({f"drafter/{name}": value for name, value in metrics.items()}, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(rows, min_size=1, max_size=5))
def test_a_model_survives_json(batch: list[Row]) -> None:
    model = observed(*step_of(batch))
    model.fade(1 / 3)
    again = AcceptanceModel.from_arrays(json.loads(json.dumps(model.to_arrays())))
    assert again.to_arrays() == model.to_arrays()


@pytest.mark.parametrize("name", ["seen", "accepted", "curve", "squared_error"])
@pytest.mark.parametrize("damage", [[], [-1.0], [math.nan], [math.inf], [1.0, 1.0]])
def test_impossible_arrays_are_refused(name: str, damage: list[float]) -> None:
    arrays = learned(0, 1, 0.5, 10, 5).to_arrays()
    with pytest.raises(ValueError, match=f"acceptance: {name}"):
        AcceptanceModel.from_arrays({**arrays, name: arrays[name][1:] + damage})


def test_more_accepted_than_seen_is_refused() -> None:
    """It would make probabilities above 1, which the index refuses in the middle of a run."""
    arrays = learned(0, 1, 0.5, 10, 5).to_arrays()
    with pytest.raises(ValueError, match="acceptance"):
        AcceptanceModel.from_arrays({**arrays, "accepted": [2.0 * n + 100.0 for n in arrays["seen"]]})


def simulate(table: np.ndarray | None, num_rows: int, seed: int) -> AcceptanceModel:
    """Drafts whose tokens are accepted far less often than their relative weight says."""
    rng = np.random.default_rng(seed)
    weight, match_len = rng.uniform(0.5, 1.0, (num_rows, WIDTH)), rng.integers(1, 20, num_rows)
    classes = rng.integers(0, len(SOURCE_CLASSES), num_rows)
    cells = np.zeros(weight.shape, np.int16)
    for i, j in np.ndindex(*weight.shape):
        cells[i, j] = cell(int(classes[i]), int(match_len[i]) + j, weight[i, j])
    chance = weight**2 * (0.4 + 0.02 * match_len[:, None])
    kept = np.cumprod(rng.uniform(size=weight.shape) < chance, axis=1).sum(axis=1)
    estimate = np.cumprod(weight if table is None else table[cells], axis=1)
    return observed(cells, estimate, np.full(num_rows, WIDTH), kept, rng.uniform(size=num_rows) < 0.05)


def test_what_was_learned_is_calibrated_on_fresh_data() -> None:
    raw = simulate(None, 20_000, seed=1)
    fresh = simulate(raw.probabilities(), 5_000, seed=2)
    assert raw.metrics()["drafter/calibration_error"] > 0.2
    assert fresh.metrics()["drafter/calibration_error"] < 0.05
    assert fresh.metrics()["drafter/brier"] < raw.metrics()["drafter/brier"]


def test_an_engine_calibrates_often_at_first() -> None:
    assert [n for n in range(1, 130) if calibrates_after(n)] == [1, 2, 4, 8, 16, 32, 64, 96, 128]

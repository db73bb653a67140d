"""Importance weights, masks, and what they do to an update."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.conf.learning import AlgoConfig
from slipstream.trainer.batch import TrainSample, pad
from slipstream.trainer.config import load_settings
from slipstream.trainer.correction import (
    Rejection,
    Weights,
    correct,
    correct_samples,
    importance_weights,
    rejection_mask,
)
from slipstream.trainer.errors import ConfigError

RATIOS = torch.tensor([[3.0, 0.2, 1.0], [1.5, 1.5, 99.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token", [[2.0, 0.2, 1.0], [1.5, 1.5, 0.0]]),
        ("sequence", [[0.6, 0.6, 0.6], [2.0, 2.0, 0.0]]),
        ("icepop", [[0.0, 0.0, 1.0], [1.5, 1.5, 0.0]]),
    ],
)
def test_weights_by_hand(kind: Weights, expected: list[list[float]]) -> None:
    weights, metrics = importance_weights(RATIOS.log(), MASK, kind, (0.5, 2.0))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(weights[MASK].mean().item())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token", [[False, False, True], [True, True]]),
        ("sequence", [[True, True, True], [False, False]]),
        ("sequence_mean", [[True, True, True], [True, True]]),
    ],
)
def test_rejection_by_hand(kind: Rejection, expected: list[list[bool]]) -> None:
    log_ratio = torch.where(MASK, RATIOS.log(), 0.0)
    keep = rejection_mask(log_ratio, MASK, kind, (0.5, 2.0))
    assert [row[mask].tolist() for row, mask in zip(keep, MASK, strict=True)] == expected


@given(
    st.sampled_from(get_args(Weights)),
    st.sampled_from(get_args(Rejection)),
    st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    st.floats(0, 3),
    st.integers(0, 99),
)
def test_weights_stay_in_their_bounds_and_equal_policies_change_nothing(
    weights: Weights, rejection: Rejection, lengths: list[int], distance: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rollout = -torch.rand(mask.shape, generator=generator, dtype=torch.float64) * 5
    learner = rollout + distance * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    done = correct(learner, rollout, mask, weights, (0.5, 2.0), rejection, (0.5, 2.0))
    assert not (done.keep & ~mask).any()
    assert all(math.isfinite(value) for value in done.metrics.values())
    if done.weights is not None:
        assert (done.weights[~mask] == 0).all()
        assert (done.weights <= 2.0 + 1e-12).all()
        assert not done.weights.requires_grad
    same = correct(rollout, rollout, mask, weights, (0.5, 2.0), rejection, (0.5, 2.0))
    assert torch.equal(same.keep, mask)
    assert same.weights is None or torch.equal(same.weights, mask.double())
    assert same.metrics["rollout_corr/kl"] == 0


def test_nothing_to_look_at_and_bounds_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="holds no token"):
        correct(RATIOS, RATIOS, MASK & False, "token", (0.5, 2.0), "off", (0.5, 2.0))
    with pytest.raises(ValueError, match="in this order"):
        importance_weights(RATIOS, MASK, "token", (2.0, 0.5))


def sample(ratios: list[float], advantage: float = 1.0) -> tuple[TrainSample, np.ndarray]:
    """A sample whose learner differs from the rollout policy by these ratios, and the learner's log-probabilities."""
    rollout = np.full(len(ratios), -1.0, np.float32)
    tokens = np.arange(3, 3 + len(ratios), dtype=np.int32)
    return TrainSample(np.array([1, 2], np.int32), tokens, rollout, advantage), rollout + np.log(ratios, dtype="f4")


def test_corrected_samples_reach_the_micro_batches() -> None:
    made = [sample([1.0, 4.0, 1.0]), sample([100.0]), sample([0.9, 1.0])]
    algo = AlgoConfig.model_validate({"max_staleness_steps": 2, "correction": {"rejection": "token"}})
    samples, metrics = correct_samples([s for s, _ in made], [logp for _, logp in made], algo)
    assert [s.num_tokens for s in samples] == [2, 2]
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(2 / 6)
    batch = pad(samples, [0, 1]).rows
    row = batch.order.index(0)
    assert batch.mask[row].tolist() == [False, True, False, True, False]
    assert batch.weights[row, 1:4].tolist() == pytest.approx([1.0, 2.0, 1.0])
    assert batch.rollout_logp[row, 1:4].tolist() == [-1.0, -1.0, -1.0]
    assert batch.old_logp[row, 2] == pytest.approx(-1 + math.log(4))


@pytest.mark.parametrize(
    ("overrides", "weights", "recomputes"),
    [
        ([], "off", False),
        (["algo.max_staleness_steps=2"], "token", True),
        (["algo.max_staleness_steps=2", "algo.correction.weights=off"], "off", True),
        (["algo.max_staleness_steps=2", "algo.correction.proximal=rollout"], "off", False),
        (["algo.correction.weights=icepop"], "icepop", True),
        (["algo.correction.rejection=sequence"], "off", True),
    ],
)
def test_the_correction_is_on_when_rollouts_may_be_stale(overrides: list[str], weights: str, recomputes: bool) -> None:
    algo = load_settings(overrides).algo
    assert (algo.weights, algo.recomputes_logprobs) == (weights, recomputes)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algo.correction.weight_low=3"], "algo.correction.weight_low=3.0 is above algo.correction.weight_high=2.0"),
        (
            ["algo.correction.proximal=rollout", "algo.correction.weights=token"],
            "both need algo.correction.proximal=learner",
        ),
        (["algo.correction.weights=tis"], "allowed: auto, off, token, sequence, icepop"),
        (["algo.correction.wights=token"], "nearest: algo.correction.weights"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(overrides)
    assert words in str(error.value)
    assert "\n" not in str(error.value)

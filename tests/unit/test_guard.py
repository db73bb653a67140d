"""The guard: unbiased, finds what loses, tries again, and says so."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from slipstream.rollout.guard import FIRST_WAIT, Guard, GuardState


def drive(guard: Guard, num_steps: int, gain: float, noise: float = 0.2, seed: int = 0, tokens: float = 3.0) -> None:
    """Steps whose batch shrinks and grows; drafts multiply progress by `tokens`, and time by tokens (1 - gain)."""
    rng = np.random.default_rng(seed)
    for i in range(num_steps):
        plain = (1.0 + np.sin(i / 97) ** 2) * 1e-3 * rng.lognormal(0, noise)
        if guard.allows():
            guard.observe(plain * tokens * (1 - gain), tokens * rng.lognormal(0, 0.1))
        elif guard.speculating:
            guard.observe(plain, 1.0)


@pytest.mark.parametrize("gain", [-0.3, 0.0, 0.4])
def test_the_gain_is_measured_without_bias(gain: float) -> None:
    """Over many guards that never decide, the mean of the estimates is the true gain."""
    values, inside = [], 0
    for seed in range(40):
        guard = Guard(seed)
        drive(guard, 5 * 32, gain, seed=seed)  # too few blocks to switch anything
        for _ in range(20):
            guard._sums[0] = max(guard._sums[0], 6.0)
        values.append(1.0 - guard._sums[2] / guard._sums[1])
        inside += abs(values[-1] - gain) < 0.3
    assert np.mean(values) == pytest.approx(gain, abs=0.05)
    assert inside > 35


def test_speculation_that_loses_goes_off_is_retried_and_both_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    with caplog.at_level(logging.WARNING, logger="slipstream.rollout.guard"):
        drive(guard, 2000, gain=-0.5)
    assert guard.metrics()["das/guard_switched_off"] >= 1
    assert any("costs more than it saves" in record.message for record in caplog.records)
    drive(guard, 4 * FIRST_WAIT, gain=-0.5, seed=1)
    assert guard.metrics()["das/guard_retries"] >= 1
    assert any("tried again" in record.message for record in caplog.records)


def test_a_retry_that_wins_stays_on() -> None:
    guard = Guard()
    drive(guard, 1000, gain=-0.5)
    switched_off = guard.num_switched_off
    assert switched_off >= 1
    # A trial may have begun under the old gain; the next one sees the new gain alone.
    while guard.speculating:
        drive(guard, 10, gain=-0.5)
    switched_off = guard.num_switched_off
    drive(guard, 8000, gain=0.5, seed=1)
    assert guard.speculating
    assert guard.metrics()["das/guard_gain"] == pytest.approx(0.5, abs=0.1)
    assert guard.num_switched_off == switched_off


def test_retries_that_lose_come_ever_later() -> None:
    guard = Guard()
    drive(guard, 30000, gain=-0.5, noise=0.05)
    assert 3 <= guard.num_retries <= 6


def test_what_wins_is_left_alone_and_hardly_disturbed() -> None:
    guard = Guard()
    drive(guard, 20000, gain=0.5)
    assert guard.num_switched_off == 0
    assert guard.num_held_out < 0.01 * 20000


def test_a_restored_guard_remembers_that_drafting_loses() -> None:
    guard = Guard()
    while guard.speculating:
        drive(guard, 10, gain=-0.5)
    drive(guard, 100, gain=-0.5)
    state = GuardState.from_arrays(json.loads(json.dumps(guard.state().to_arrays())))
    assert state == guard.state()
    again = Guard()
    again.restore(state)
    assert not again.speculating
    assert again.metrics() == guard.metrics()
    # The trial comes when it would have come, and its loss doubles the wait.
    left = state.wait - state.waited
    drive(again, left - 1, gain=-0.5)
    assert again.num_retries == 0
    drive(again, 200, gain=-0.5)
    assert again.num_retries == 1
    while again.speculating:
        drive(again, 10, gain=-0.5)
    assert again.state().wait == 2 * FIRST_WAIT


def test_a_restored_guard_knows_the_gain_it_had() -> None:
    guard, again = Guard(), Guard()
    drive(guard, 3000, gain=0.4)
    again.restore(guard.state())
    assert again.gain() == guard.gain()
    assert again.gain().low > 0.0


@pytest.mark.parametrize(
    ("change", "word"),
    [({"sums": [1.0]}, "6 finite"), ({"sums": [np.nan] * 6}, "6 finite"), ({"wait": -1}, "0 or more")],
)
def test_an_impossible_state_is_refused(change: dict, word: str) -> None:
    arrays = Guard().state().to_arrays()
    with pytest.raises(ValueError, match=word):
        GuardState.from_arrays(arrays | change)
    with pytest.raises(KeyError, match="waited"):
        GuardState.from_arrays({name: value for name, value in arrays.items() if name != "waited"})


def test_no_measurement_is_too_odd() -> None:
    guard = Guard()
    for i in range(3000):
        guard.allows()
        guard.observe([0.0, -1.0, float("nan"), float("inf"), 1e-3][i % 5], [0.0, float("nan"), 1.0][i % 3])
    assert all(np.isfinite(value) for value in guard.metrics().values())

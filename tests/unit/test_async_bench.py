"""The simulated job: hand-made cases, the bound on staleness, and what running ahead is worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.experiments.async_training.run import summarize
from slipstream.experiments.async_training.simulation import Scene, SimulatedWorker, Simulation

SMALL = Scene(num_workers=4, slots_per_worker=4, groups_per_step=4, samples_per_group=4, median_tokens=100.0)


def test_one_request_takes_its_tokens_and_the_update() -> None:
    scene = Scene(1, 1, 1, 1, step_s=0.5, token_s=0.5, median_tokens=10.0, sigma=0.0)
    outcome = Simulation(scene, 0, 3.0, 2).run()
    assert outcome.wall_s == pytest.approx(2 * (10 + 3))
    assert outcome.idle_share == pytest.approx(6 / 26)
    ahead = Simulation(scene, 1, 3.0, 2).run()
    assert ahead.wall_s == pytest.approx(10 + 10 + 3), "the second group is generated while the first is trained on"


def test_live_requests_share_a_worker() -> None:
    worker = SimulatedWorker(Scene(slots_per_worker=2, step_s=1.0, token_s=1.0))
    for uid, length in ((0, 4), (1, 8), (2, 1)):
        worker.submit(uid, length)
    worker.fill()
    assert worker.num_held == 3
    assert worker.next_finish() == pytest.approx(4 * 3.0)
    worker.advance(12.0)
    assert worker.finish() == 0
    worker.fill()
    assert worker.next_finish() == pytest.approx(12 + 3.0)
    worker.advance(15.0)
    assert worker.finish() == 2
    assert worker.next_finish() == pytest.approx(15 + 3 * 2.0), "alone it is faster"


@given(st.integers(0, 3), st.floats(0, 30), st.integers(0, 9))
def test_no_step_is_staler_than_the_bound_and_every_step_is_trained(staleness: int, train_s: float, seed: int) -> None:
    scene = Scene(3, 2, 2, 3, median_tokens=60.0, sigma=1.5, seed=seed)
    outcome = Simulation(scene, staleness, train_s, 6).run()
    assert outcome.staleness_max <= staleness
    assert outcome.wall_s >= 6 * train_s
    assert 0 <= outcome.idle_share < 1


def test_running_ahead_helps_where_lengths_differ() -> None:
    sync, ahead = (Simulation(SMALL, staleness, 2.0, 30).run() for staleness in (0, 2))
    assert ahead.wall_s < 0.8 * sync.wall_s
    assert ahead.idle_share < sync.idle_share


def test_the_default_scene_is_long_tailed() -> None:
    lengths = np.concatenate([Scene().lengths(group) for group in range(200)])
    assert lengths.max() > 5 * np.median(lengths)
    assert np.array_equal(Scene().lengths(3), Scene().lengths(3))


def test_idle_shares_are_of_the_whole_step() -> None:
    sync = {
        "timing_s/step": 2.0,
        "timing_s/gen": 1.0,
        "timing_s/update_actor": 0.5,
        "perf/worker_idle_share": 0.2,
        "critic/rewards/mean": 0.5,
    }
    summary = summarize([sync] * 4)
    assert summary["steps_per_hour"] == 1800
    assert summary["worker_idle_share"] == pytest.approx(0.6)
    assert summary["learner_idle_share"] == pytest.approx(0.75)
    streaming = sync | {"async/groups_open": 1.0}
    assert summarize([streaming] * 4)["worker_idle_share"] == pytest.approx(0.2)

"""Real workers, few slots: queued requests move, tokens stay, guards come back after a resume, a death is named."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from slipstream.rollout.actors import PoolError, make_actor
from slipstream.rollout.guard import Guard
from slipstream.rollout.learned import Learned
from slipstream.rollout.pool import MAX_CONCURRENCY, RolloutPool
from slipstream.rollout.roster import PoolLimits
from slipstream.rollout.streaming_pool import StreamingPool
from slipstream.rollout.streaming_worker import StreamingWorker
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid
from slipstream.trainer.cluster import ray_cluster, worker_spec
from slipstream.trainer.config import load_settings, model_folder
from slipstream.trainer.data.prompts import load_prompts
from slipstream.trainer.data.tokenizer import load_tokenizer

DEADLINE_S = 120.0
SETTINGS = load_settings(["experiment=quickstart_short", "engine.max_live_requests=2", "cluster.num_workers=2"])
SHORT, LONG = 4, 160


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(SETTINGS.cluster):
        yield


def make_pool(kind: type[RolloutPool], steal: bool, **limits: Any) -> RolloutPool:
    """Workers queue whatever they are dealt, unless limits say otherwise."""
    folder = model_folder(SETTINGS.model.path)
    assert folder is not None
    limits = {"max_queued_per_worker": 100} | limits
    pool = kind(worker_spec(SETTINGS, str(folder), 100), 2, 1.0, 0.0, steal=steal, limits=PoolLimits(**limits))
    pool.ready(DEADLINE_S)
    return pool


def end(pool: RolloutPool) -> None:
    pool.close()
    for worker in pool._crew.roster:
        ray.kill(worker.handle)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """All of the same predicted length, dealt in turns: worker 0 gets the long ones, worker 1 the short ones."""
    folder = model_folder(SETTINGS.model.path)
    assert folder is not None
    prompts = load_prompts(SETTINGS.data, load_tokenizer(folder), SETTINGS.run.seed).train[:4]
    return [
        Request(request_uid(0, 0, i, 0), f"{i}", i, prompts[i % 4].tokens, Sampling(LONG if i % 2 == 0 else SHORT))
        for i in range(16)
    ]


def tokens(rollouts: list[Rollout]) -> dict[int, list[int]]:
    out = {rollout.request.uid: rollout.tokens.tolist() for rollout in rollouts}
    assert len(out) == len(rollouts), "a request came back twice"
    return out


def collect(pool: StreamingPool, num: int) -> list[Rollout]:
    out: list[Rollout] = []
    until = time.monotonic() + DEADLINE_S
    while len(out) < num and time.monotonic() < until:
        out += pool.poll(1.0)
    assert len(out) == num
    assert set(pool.num_in_flight.values()) == {0}
    return out


def test_queued_requests_move_and_no_token_changes(cluster: None, requests: list[Request]) -> None:
    still = make_pool(RolloutPool, steal=False)
    expected = still.generate(requests, {}, DEADLINE_S)
    assert expected.num_stolen == 0
    assert [one.finished for one in expected.stats] == [8, 8]
    end(still)
    pool = make_pool(RolloutPool, steal=True)
    for _ in range(2):
        result = pool.generate(requests, {}, DEADLINE_S)
        assert [r.request.uid for r in result.rollouts] == [r.uid for r in requests]
        assert tokens(result.rollouts) == tokens(expected.rollouts)
        assert 0 < result.num_stolen < 8
        assert [one.finished for one in result.stats] == [8 - result.num_stolen, 8 + result.num_stolen]
        assert all(seconds > 0 for seconds in result.busy_s)
    # What is learned between batches goes through the same workers, and a batch that fits needs no moves.
    plain = pool.generate(requests[:4], {}, DEADLINE_S, speculate=False)
    assert plain.num_stolen == 0
    assert tokens(plain.rollouts) == {r.uid: tokens(expected.rollouts)[r.uid] for r in requests[:4]}
    assert sum(one.drafted for one in plain.stats) == 0
    end(pool)


@pytest.mark.parametrize("steal", [True, False])
def test_a_stream_of_requests_moves_too(cluster: None, requests: list[Request], steal: bool) -> None:
    pool = make_pool(StreamingPool, steal)
    assert isinstance(pool, StreamingPool)
    pool.submit(requests, {})
    assert pool.num_in_flight == {"rollout worker 0": 8, "rollout worker 1": 8, "waiting": 0}
    rollouts = collect(pool, len(requests))
    assert (pool.take_num_stolen() > 0) == steal
    assert pool.take_num_stolen() == 0
    pool.submit(requests, {})
    assert tokens(collect(pool, len(requests))) == tokens(rollouts)
    end(pool)


def test_a_resumed_jobs_guards_go_on(cluster: None, requests: list[Request]) -> None:
    """Drafting was found to lose on one worker and not on the other: it stays so, each with its own counts."""
    pool = make_pool(RolloutPool, steal=True)
    fresh = Guard().state()
    guards = [replace(fresh, speculating=False, wait=8192, switched_off=3, retries=2), replace(fresh, held_out=40)]
    pool.publish(5, [], Learned(guards=guards), DEADLINE_S)
    for _ in range(2):
        result = pool.generate(requests, {}, DEADLINE_S)
        states = [one.guard for one in result.observed]
        assert states[0] is not None
        assert states[1] is not None
        assert (states[0].speculating, states[0].switched_off, states[0].retries) == (False, 3, 2)
        assert states[1].speculating
        assert states[1].held_out >= 40
        assert result.stats[0].drafted == 0
        # A step later the workers know better than what the job last heard.
        pool.publish(6, [], Learned(guards=[fresh]).without_lengths(), DEADLINE_S)
    end(pool)


def test_a_worker_that_dies_meanwhile_is_named(cluster: None, requests: list[Request]) -> None:
    pool = make_pool(RolloutPool, steal=True, max_worker_restarts=0)
    pid = re.match(r"process (\d+)", pool.dump_stacks(DEADLINE_S)["rollout worker 1"])
    assert pid is not None
    threading.Timer(0.5, os.kill, (int(pid[1]), signal.SIGKILL)).start()
    with pytest.raises(PoolError, match=r"an actor died \(rollout worker 1\)"):
        generate_for(DEADLINE_S, pool, requests)
    end(pool)


def generate_for(seconds: float, pool: RolloutPool, requests: list[Request]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pool.generate(requests, {}, DEADLINE_S)


def test_a_worker_that_multiplies_otherwise_is_refused(cluster: None) -> None:
    """Its tokens would be others: here it is built from another spec, as on a machine without AMX."""
    pool = make_pool(RolloutPool, steal=True)
    products = next(iter(pool.workers.values()))["products"]
    folder = model_folder(SETTINGS.model.path)
    other = replace(worker_spec(SETTINGS, str(folder), 100), cpu_products="fma" if products == "tiles" else "tiles")
    pool._crew._make = lambda _: make_actor(StreamingWorker, 0.0, 0.0, MAX_CONCURRENCY).remote(other)
    name = pool.add_worker()
    with pytest.raises(PoolError, match=f"{name} multiplies by {other.cpu_products}, rollout worker 0 by {products}, "):
        pool.ready(DEADLINE_S)
    end(pool)

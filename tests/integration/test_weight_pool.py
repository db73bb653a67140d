"""Weights on their way to real workers: all serve the new version or all the old one, whoever comes and goes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from slipstream.rollout.actors import PoolError, PoolTimeout
from slipstream.rollout.model_loader import load_policy
from slipstream.rollout.pool import RolloutPool
from slipstream.rollout.roster import PoolLimits
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Sampling
from slipstream.rollout.weight_handle import ComingHandle, Share, WeightHandle
from slipstream.trainer.cluster import ray_cluster, worker_spec
from slipstream.trainer.config import load_settings, model_folder
from slipstream.trainer.weight_sync import WeightPublisher, WeightSpec, named_weights
from tests.weight_damage import damaged_version

DEADLINE_S = 120.0
SETTINGS = load_settings(["experiment=quickstart_short", "cluster.num_workers=2", "drafter=off", "budget=off"])
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> str:
    path = model_folder(SETTINGS.model.path)
    assert path is not None
    return str(path)


@pytest.fixture(scope="module")
def pool(folder: str) -> Iterator[RolloutPool]:
    with ray_cluster(SETTINGS.cluster):
        pool = RolloutPool(worker_spec(SETTINGS, folder, 100), 2, 1.0, 0.0, limits=PoolLimits(max_worker_restarts=9))
        pool.ready(DEADLINE_S)
        yield pool
        pool.close()


def requests() -> list[Request]:
    return [Request(i, f"p{i}", i, np.arange(4, 9, dtype=np.int32), Sampling(16, seed=3)) for i in range(8)]


def tokens(pool: RolloutPool) -> list[list[int]]:
    return [rollout.tokens.tolist() for rollout in pool.generate(requests(), {}, DEADLINE_S).rollouts]


def versions(pool: RolloutPool) -> set[int]:
    rollouts = pool.generate(requests(), {}, DEADLINE_S).rollouts
    return {int(version) for rollout in rollouts for version in rollout.policy_versions}


def noisy_policy(folder: str, seed: int) -> torch.nn.Module:
    model = load_policy(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return model


def fresh_tokens(folder: str, seed: int) -> list[list[int]]:
    engine = TorchEngine(noisy_policy(folder, seed), max_len=256)  # type: ignore[arg-type]
    engine.submit(requests())
    rollouts = {rollout.request.uid: rollout for rollout in engine.drain(DEADLINE_S)}
    return [rollouts[request.uid].tokens.tolist() for request in requests()]


def test_an_update_that_has_ended_is_not_made_up_for(pool: RolloutPool, folder: str) -> None:
    """A worker is stopped until the update has timed out: it prepares afterwards, and still nobody serves it."""
    publisher = WeightPublisher(WeightSpec("shared_memory"))
    pool.update_policy(publisher.publish({"policy": named_weights(noisy_policy(folder, 0))}, 5), DEADLINE_S)
    slow = list(pool._crew.roster)[1]
    handle = publisher.publish({"policy": named_weights(noisy_policy(folder, 1))}, 6)
    os.kill(slow.facts["pid"], signal.SIGSTOP)
    try:
        with pytest.raises(PoolTimeout, match="weights of version 6: waited 1 s for rollout worker 1"):
            pool.update_policy(handle, 1.0)
    finally:
        os.kill(slow.facts["pid"], signal.SIGCONT)
    # Its answer comes after that of the call before.
    ray.get(slow.handle.prepare_policy.remote(handle, Share(), DEADLINE_S), timeout=DEADLINE_S)
    assert versions(pool) == {5}
    pool.update_policy(handle, DEADLINE_S)
    assert versions(pool) == {6}
    publisher.close()


def test_the_learners_answer_goes_to_the_workers_without_the_driver(pool: RolloutPool, folder: str) -> None:
    publisher = WeightPublisher(WeightSpec("shared_memory"))
    handle = publisher.publish({"policy": named_weights(noisy_policy(folder, 1))}, 7)
    served_before, ref = versions(pool), ray.put(handle)

    def never() -> WeightHandle:
        raise PoolError("the policy learner died")

    with pytest.raises(PoolError, match="the policy learner died"):
        pool.update_policy(ComingHandle(ref, never), DEADLINE_S)
    assert versions(pool) == served_before
    update = pool.update_policy(ComingHandle(ref, lambda: handle), DEADLINE_S)
    # One thread writes, so one worker reads: the workers see that by the handle.
    assert sorted(receipt.verified.of for receipt in update.receipts.values()) == [0, 1]
    assert versions(pool) == {7}
    publisher.close()


@pytest.mark.parametrize("transport", ["shared_memory", "object_store", "disk", "broadcast"])
def test_all_workers_or_none(transport: str, pool: RolloutPool, folder: str, tmp_path: Path) -> None:
    publisher = WeightPublisher(WeightSpec(transport, folder=str(tmp_path), num_receivers=2))
    weights = [named_weights(noisy_policy(folder, seed)) for seed in (0, 1, 2)]
    metrics = pool.update_policy(publisher.publish({"policy": weights[0]}, 10), DEADLINE_S).metrics()
    assert metrics["weights/whole_transfers"] == 2
    assert metrics["weights/bytes_fetched"] == metrics["weights/bytes_full"] * (1 + (transport == "broadcast"))
    assert tokens(pool) == fresh_tokens(folder, 0)
    assert versions(pool) == {10}
    handle = publisher.publish({"policy": weights[1]}, 11)
    said = r"rollout worker .*WeightError: weights .*: block"
    with damaged_version(publisher, handle) as broken, pytest.raises(PoolError, match=said):
        pool.update_policy(broken, DEADLINE_S)
    assert versions(pool) == {10}
    assert tokens(pool) == fresh_tokens(folder, 0)
    pool.update_policy(handle, DEADLINE_S)
    assert versions(pool) == {11}
    # A worker that is started again gets the current handle, alone; the next version finds it among the others.
    ray.kill(list(pool._crew.roster)[1].handle)
    assert tokens(pool) == fresh_tokens(folder, 1)
    pool.ready(DEADLINE_S)
    assert [facts["state"] for facts in pool.workers.values()] == ["serving", "serving"]
    assert pool.metrics()["pool/restarts"] >= 1
    assert versions(pool) == {11}
    assert tokens(pool) == fresh_tokens(folder, 1)
    pool.update_policy(publisher.publish({"policy": weights[2]}, 12), DEADLINE_S)
    assert versions(pool) == {12}
    assert tokens(pool) == fresh_tokens(folder, 2)
    publisher.close()

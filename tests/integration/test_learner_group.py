"""Two learners in two processes over gloo: the same updates as one, the same files, and a death that is one line."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from slipstream.conf.schema import AlgoConfig, ClusterConfig, LearnerConfig
from slipstream.rollout.actors import PoolError
from slipstream.trainer.batch import TrainSample
from slipstream.trainer.cluster import ray_cluster
from slipstream.trainer.learner_group import LearnerGroup
from slipstream.trainer.policy import LearnerSpec, PolicyLearner
from tests.tiny_models import tiny_model

CLUSTER = ClusterConfig(num_workers=1, num_learners=2, threads_for_learner=1, update_timeout_s=60.0)
# Every path of the loss: its own log-probabilities, a reference, several updates, gradients added up over passes.
ALGO = AlgoConfig(
    num_steps=8,
    max_staleness_steps=1,
    kl_coef=0.05,
    num_updates_per_step=2,
    max_tokens_per_microbatch=48,
    schedule="cosine",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(CLUSTER):
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("policy")
    tiny_model("qwen3").save_pretrained(path)
    return str(path)


def make_spec(policy: str, num_learners: int, dtype: str = "float32", **learner: bool) -> LearnerSpec:
    return LearnerSpec(
        policy, dtype, None, 0.0, 1, 0.8, 20, ALGO, LearnerConfig(**learner), num_learners, call_timeout_s=60.0
    )


def make_samples(seed: int, num: int) -> list[TrainSample]:
    rng = np.random.default_rng(seed)
    return [
        TrainSample(
            rng.integers(3, 96, rng.integers(1, 9)).astype(np.int32),
            rng.integers(3, 96, length := rng.integers(1, 20)).astype(np.int32),
            rng.normal(-5, 0.2, length).astype(np.float32),
            float(rng.normal()),
        )
        for _ in range(num)
    ]


def steps() -> Iterator[tuple[int, list[TrainSample]]]:
    """The last one is too small for two learners: one of them has nothing to do."""
    for step, num in enumerate((7, 12, 5, 9, 1), start=1):
        yield step, make_samples(step, num)


def weights_of(group: LearnerGroup) -> dict[str, torch.Tensor]:
    group.gather(1).result()
    return ray.get(group.weights())


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        torch.testing.assert_close(tensor, other[name], atol=atol, rtol=0)


@pytest.mark.parametrize(
    "config",
    [{}, {"packing": True, "activation_checkpointing": True, "reduce_every_microbatch": False}],
    ids=["padded", "packed"],
)
def test_two_learners_are_one(config: dict[str, bool], cluster: None, policy: str, tmp_path: Path) -> None:
    """Five steps, then on from each other's checkpoint."""
    one, two = PolicyLearner(make_spec(policy, 1, **config)), LearnerGroup(make_spec(policy, 2, **config), CLUSTER)
    two.ready().result()
    for step, samples in steps():
        expected, actual = one.update(samples, step), two.update(samples, step).result()
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5), f"step {step}"
        assert actual["actor/grad_norm"] > 0
        assert_close(one.weights(), weights_of(two), 1e-5)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one.save(str(tmp_path / "one"))
    two.save(str(tmp_path / "two")).result()
    names = [sorted(path.name for path in (tmp_path / folder).rglob("*")) for folder in ("one", "two")]
    assert names[0] == names[1]
    for file in ("policy/config.json", "policy/generation_config.json"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()
    # Crossed over: what one has written, two go on from, to the bit what they read, and the other way round.
    two_before = weights_of(two)
    two.load(str(tmp_path / "one")).result()
    assert_close(one.weights(), weights_of(two), 0.0)
    one.load(str(tmp_path / "two"))
    assert_close(one.weights(), two_before, 0.0)
    samples = make_samples(9, 6)
    one.update(samples, 6)
    two.update(samples, 6).result()
    assert_close(one.weights(), weights_of(two), 2e-5)
    two.close()


def test_a_learner_that_dies_is_named_in_time(cluster: None, policy: str) -> None:
    group = LearnerGroup(make_spec(policy, 2), CLUSTER)
    group.ready().result()
    dead = list(group.ranks.values())[1]
    pid = int(ray.get(dead.stacks.remote()).split()[1])
    call = group.update(make_samples(1, 400), 1)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(PoolError, match=r"update of step 1: .*policy learner 1") as caught:
        call.result()
    assert time.monotonic() - started < 20
    assert "\n" not in str(caught.value)
    assert "policy learner 0" not in str(caught.value)

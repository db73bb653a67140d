"""Two learners in two processes over gloo: the same updates as one, the same files, and a death that is one line."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from slipstream.conf.learning import AlgoConfig, LearnerConfig
from slipstream.conf.schema import ClusterConfig
from slipstream.rollout.actors import PoolError, PoolTimeout
from slipstream.trainer.batch import TrainSample
from slipstream.trainer.cluster import ray_cluster
from slipstream.trainer.learner_group import LearnerGroup
from slipstream.trainer.policy import LearnerSpec, PolicyLearner
from tests.learner_weights import weights_of, weights_of_group
from tests.tiny_models import tiny_model

CLUSTER = ClusterConfig(num_workers=1, num_learners=2, threads_for_learner=1, update_timeout_s=60.0)
LISTEN, LOOPBACK_HEX = "0A", "0100007F"
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
        policy,
        dtype,
        None,
        0.0,
        1,
        0.8,
        20,
        ALGO,
        LearnerConfig(**learner),
        num_learners=num_learners,
        call_timeout_s=60.0,
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


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        torch.testing.assert_close(tensor, other[name], atol=atol, rtol=0)


@pytest.fixture(scope="module")
def two(cluster: None, policy: str) -> Iterator[LearnerGroup]:
    group = LearnerGroup(make_spec(policy, 2), CLUSTER)
    group.ready().result()
    yield group
    group.close()


def test_two_learners_are_one(two: LearnerGroup, policy: str, tmp_path: Path) -> None:
    compare(PolicyLearner(make_spec(policy, 1)), two, tmp_path)


@pytest.mark.slow  # starts two more learners
def test_two_learners_are_one_with_every_switch_turned(cluster: None, policy: str, tmp_path: Path) -> None:
    switches = {"packing": True, "activation_checkpointing": True, "reduce_every_microbatch": False}
    group = LearnerGroup(make_spec(policy, 2, **switches), CLUSTER)
    group.ready().result()
    compare(PolicyLearner(make_spec(policy, 1, **switches)), group, tmp_path)
    group.close()


def compare(one: PolicyLearner, two: LearnerGroup, folder: Path) -> None:
    """Five steps, then on from each other's checkpoint."""
    for step, samples in steps():
        expected, actual = one.update(samples, step), two.update(samples, step).result()
        # How long each waited for the weights of the version before, which says nothing about the update.
        waits = [metrics.pop("weights/settle_s") for metrics in (expected, actual)]
        assert min(waits) >= 0.0
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5), f"step {step}"
        assert actual["actor/grad_norm"] > 0
        assert_close(weights_of(one), weights_of_group(two), 1e-5)
    by_one, by_two = folder / "one", folder / "two"
    by_one.mkdir()
    by_two.mkdir()
    one.save(str(by_one))
    two.save(str(by_two), 60.0).result()
    assert sorted(path.name for path in by_one.rglob("*")) == sorted(path.name for path in by_two.rglob("*"))
    for file in ("config.json", "generation_config.json"):
        assert (by_one / "policy" / file).read_text() == (by_two / "policy" / file).read_text()
    # Crossed over: what one has written, two go on from, to the bit what they read, and the other way round.
    two_before = weights_of_group(two)
    two.load(str(by_one)).result()
    assert_close(weights_of(one), weights_of_group(two), 0.0)
    one.load(str(by_two))
    assert_close(weights_of(one), two_before, 0.0)
    samples = make_samples(9, 6)
    one.update(samples, 6)
    two.update(samples, 6).result()
    assert_close(weights_of(one), weights_of_group(two), 2e-5)


def test_the_rendezvous_is_not_open_to_the_network(two: LearnerGroup) -> None:
    """Every port that learners listen on for each other is on loopback; Ray's own are those of any actor."""
    idle = Idle.remote()
    of_ray = Counter(listening_addresses(ray.get(idle.process_id.remote())))
    for handle in two.ranks.values():
        ours = Counter(listening_addresses(int(ray.get(handle.stacks.remote()).split()[1]))) - of_ray
        assert set(ours) == {LOOPBACK_HEX}


@ray.remote(num_cpus=0)
class Idle:
    """An actor that does nothing."""

    def process_id(self) -> int:
        return os.getpid()


def listening_addresses(pid: int) -> list[str]:
    """Local addresses, as /proc prints them, of the sockets that a process listens on."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:"):
            inodes.add(target[8:-1])
    out = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                out.append(fields[1].partition(":")[0])
    return out


def test_a_learner_that_dies_is_named_in_time(two: LearnerGroup) -> None:
    """Last of those that share the group, which ends here."""
    dead = list(two.ranks.values())[1]
    pid = int(ray.get(dead.stacks.remote()).split()[1])
    call = two.update(make_samples(1, 400), 1)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(PoolError, match=r"update of step 1: .*policy learner 1") as caught:
        call.result()
    assert time.monotonic() - started < 20
    assert "\n" not in str(caught.value)
    assert "policy learner 0" not in str(caught.value)


@pytest.mark.slow  # starts two more learners
def test_a_learner_that_is_stopped_is_named_at_the_deadline(cluster: None, policy: str) -> None:
    group = LearnerGroup(make_spec(policy, 2), CLUSTER.model_copy(update={"update_timeout_s": 5.0}))
    group.ready().result()
    stopped = list(group.ranks.values())[1]
    pid = int(ray.get(stopped.stacks.remote()).split()[1])
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(PoolTimeout, match=r"waited 5 s for policy learner 0, policy learner 1; no answer from .* 1$"):
        group.update(make_samples(1, 6), 1).result()


@pytest.mark.slow  # starts two more learners
def test_an_error_of_one_learner_is_one_line(cluster: None, policy: str, tmp_path: Path) -> None:
    """Rank 0 alone writes, so what it cannot write is its error alone."""
    group = LearnerGroup(make_spec(policy, 2), CLUSTER)
    group.ready().result()
    (tmp_path / "optimizer.safetensors").mkdir()
    with pytest.raises(PoolError, match=r"checkpoint: policy learner 0: \w+") as caught:
        group.save(str(tmp_path), 60.0).result()
    assert "\n" not in str(caught.value)

"""Checkpoints in the background, with a real learner in a Ray process: what is written, when, and what goes wrong."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from slipstream.conf.schema import AlgoConfig, CheckpointConfig, ClusterConfig
from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.actors import PoolTimeout, wait_for
from slipstream.trainer.batch import TrainSample
from slipstream.trainer.checkpoint import latest, load_tensors, verify
from slipstream.trainer.cluster import ray_cluster
from slipstream.trainer.errors import CheckpointError
from slipstream.trainer.job_state import JobState
from slipstream.trainer.learner_group import LearnerCall, LearnerGroup
from slipstream.trainer.policy import LearnerSpec, PolicyLearner
from slipstream.trainer.saver import CheckpointSaver
from tests.learner_weights import weights_of_group
from tests.processes import exposed, listening_sockets
from tests.tiny_models import tiny_model

TIMEOUT_S = 60.0


class Learner(PolicyLearner):
    """The learner, on a disk that can be made small and slow."""

    gate: Path | None = None

    def hold(self, gate: str | None) -> None:
        """From now on saving waits until the file is there."""
        self.gate = Path(gate) if gate else None

    def save(self, folder: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.gate is not None and not self.gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        super().save(folder)

    def limit_files(self, num_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


CLUSTER = ClusterConfig(num_workers=1, cpus_per_worker=0.5, cpus_for_learner=0.5)


def ask(ref: Any, what: str) -> Any:
    return wait_for([ref], ["the policy learner"], what, TIMEOUT_S)[0]


def wait(call: LearnerCall) -> Any:
    return call.result()


def make_learner(model_folder: str) -> LearnerGroup:
    spec = LearnerSpec(model_folder, "float32", None, 0.0, 1, 1.0, 20, AlgoConfig())
    group = LearnerGroup(spec, CLUSTER, Learner)
    group.ready().result()
    return group


def actor_of(learner: LearnerGroup) -> Any:
    return next(iter(learner.ranks.values()))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("policy")
    tiny_model("qwen3").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def learner(model_folder: str) -> Iterator[LearnerGroup]:
    with ray_cluster(CLUSTER):
        yield make_learner(model_folder)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[JobState]:
    state = JobState.start(tmp_path, window_epochs=4)
    yield state
    state.log.close()


def samples(seed: int) -> list[TrainSample]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 96, (2, 6)).astype(np.int32)
    return [TrainSample(row[:2], row[2:], np.full(4, -2.0, np.float32), 1.0 - 2.0 * i) for i, row in enumerate(tokens)]


def one_step(learner: LearnerGroup, state: JobState) -> None:
    state.step += 1
    learner.update(samples(state.step), state.step).result()
    state.remember([HistoryRecord("p", state.step, state.step, np.arange(5, dtype=np.int32), 1.0, state.step)])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "policy" / "model.safetensors")


def saver(run_dir: Path, learner: LearnerGroup, **config: Any) -> CheckpointSaver:
    return CheckpointSaver(CheckpointConfig(**config), run_dir, learner, [], wait)


def save_through(one: CheckpointSaver, state: JobState) -> None:
    one.save(state, {})
    one.start()
    one.finish(state)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_written_is_the_state_at_the_end_of_the_step(
    asynchronous: bool, learner: LearnerGroup, state: JobState, tmp_path: Path
) -> None:
    one = saver(tmp_path, learner, asynchronous=asynchronous)
    one_step(learner, state)
    first = state.step
    expected, position = weights_of_group(learner), state.log.position
    one.save(state, {})
    assert (latest(tmp_path) is None) == asynchronous
    one_step(learner, state)
    one.start()
    one_step(learner, state)
    one.finish(state)
    found = latest(tmp_path)
    assert found is not None
    assert verify(found) == first
    written = weights_of(found)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    loaded = json.loads((found / "job.json").read_text())
    assert (loaded["step"], loaded["log_end"]) == (first, list(position))
    resumed = JobState.load(found, tmp_path, window_epochs=4)
    assert [record.step for record in resumed.log.records()] == [first]
    resumed.log.close()


def test_training_goes_on_while_one_is_written_and_the_next_one_waits(
    learner: LearnerGroup, state: JobState, tmp_path: Path
) -> None:
    one = saver(tmp_path, learner, keep_last=9, keep_best=1, best_metric="reward")
    gate = tmp_path / "gate"
    ask(actor_of(learner).hold.remote(str(gate)), "a gate")
    one_step(learner, state)
    one.save(state, {"reward": 0.9})
    one.start()
    one_step(learner, state)
    assert one.poll(state) == {}
    assert one.step == 1
    assert latest(tmp_path) is None
    impatient = saver(tmp_path, learner, timeout_s=0.2)
    impatient._writing = one._writing
    with pytest.raises(PoolTimeout, match=r"checkpoint of step 1: waited checkpoint\.timeout_s=0\.2 s"):
        impatient.save(state, {})
    gate.touch()
    metrics = one.save(state, {"reward": 0.1})
    assert set(metrics) == {"timing_s/save_checkpoint", "timing_s/write_checkpoint"}
    assert latest(tmp_path) == tmp_path / "checkpoints/step_000001"
    one.start()
    one.close(TIMEOUT_S)
    assert one.step is None
    assert latest(tmp_path) == tmp_path / "checkpoints/step_000002"
    assert json.loads((tmp_path / "checkpoints/best.json").read_text())["best"][0]["folder"] == "step_000001"


def test_a_job_that_ends_early_waits_for_a_while_and_says_what_it_gave_up(
    learner: LearnerGroup, state: JobState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = saver(tmp_path, learner)
    gate = tmp_path / "gate"
    ask(actor_of(learner).hold.remote(str(gate)), "a gate")
    one_step(learner, state)
    one.save(state, {})
    one.start()
    one.close(0.1)
    assert "the checkpoint of step 1 was not complete after 0.1 s" in capsys.readouterr().err
    gate.touch()
    one.close(TIMEOUT_S)
    assert latest(tmp_path) == tmp_path / "checkpoints/step_000001"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_one_line_at_the_next_step_and_the_earlier_one_stays(
    asynchronous: bool, learner: LearnerGroup, state: JobState, tmp_path: Path
) -> None:
    one = saver(tmp_path, learner, asynchronous=asynchronous, keep_last=1)
    one_step(learner, state)
    save_through(one, state)
    one_step(learner, state)
    ask(actor_of(learner).limit_files.remote(10_000), "a limit")
    try:
        with pytest.raises(CheckpointError) as caught:
            save_through(one, state)
    finally:
        ask(actor_of(learner).limit_files.remote(resource.RLIM_INFINITY), "a limit")
    text = str(caught.value)
    assert "\n" not in text
    assert "step_000002 cannot be written" in text
    assert "File too large" in text
    assert "last complete: step_000001" in text
    assert latest(tmp_path) == tmp_path / "checkpoints/step_000001"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_a_local_ray_listens_on_loopback_only(learner: LearnerGroup) -> None:
    """test_security.py looks at a whole job; this Ray is here anyway."""
    sockets = listening_sockets(os.getpid())
    assert any("raylet" in program for program, _ in sockets)
    assert any("Learner" in program for program, _ in sockets)
    assert exposed(sockets) == []


def test_a_metric_that_is_not_there_is_said_once(
    learner: LearnerGroup, state: JobState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = saver(tmp_path, learner, asynchronous=False, keep_best=1, best_metric="val/reward")
    for _ in range(2):
        one_step(learner, state)
        one.save(state, {"reward": 1.0})
    assert capsys.readouterr().err.count("checkpoint.best_metric=val/reward: step 1 has no such metric") == 1


@pytest.mark.slow  # another process that imports torch
def test_a_learner_that_dies_while_it_writes_is_named(
    model_folder: str, learner: LearnerGroup, state: JobState, tmp_path: Path
) -> None:
    mortal = make_learner(model_folder)
    one = saver(tmp_path, mortal)
    one_step(mortal, state)
    one.save(state, {})
    ray.kill(actor_of(mortal))
    one.start()
    with pytest.raises(Exception, match="policy learner"):
        one.finish(state)
    assert list((tmp_path / "checkpoints").iterdir()) == []

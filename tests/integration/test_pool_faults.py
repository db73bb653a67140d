"""Real workers, really killed and stopped: every request comes back once, with the tokens of an undisturbed run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.actors import PoolError, PoolTimeout
from slipstream.rollout.model_loader import default_device, load_policy
from slipstream.rollout.placement import Placement
from slipstream.rollout.pool import RolloutPool
from slipstream.rollout.roster import PoolLimits, worker_name
from slipstream.rollout.streaming_pool import StreamingPool
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid
from slipstream.rollout.weight_handle import WeightHandle
from slipstream.trainer.cluster import ray_cluster, worker_spec
from slipstream.trainer.config import load_settings, model_folder
from slipstream.trainer.data.prompts import load_prompts
from slipstream.trainer.data.tokenizer import load_tokenizer
from slipstream.trainer.weight_sync import WeightPublisher, WeightSpec, named_weights
from tests.integration.test_async_job import ASYNC, children, counts_add_up, trained_groups
from tests.integration.test_job import SMALL, command, drafter_log, jsonl, run
from tests.integration.test_job import tokens as tokens_of_job

DEADLINE_S = 120.0
SETTINGS = load_settings(["experiment=quickstart_short", "engine.max_live_requests=4", "cluster.num_workers=3"])
FOLDER = model_folder(SETTINGS.model.path)
FAST = {"worker_timeout_s": 2.0}
NUM_REQUESTS, NUM_PROMPTS, NUM_TOKENS = 24, 4, 200
Tokens = dict[int, list[int]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(SETTINGS.cluster):
        yield


@contextmanager
def pool_of(
    kind: type[RolloutPool], num_workers: int = 2, placement: Placement | None = None, **limits: Any
) -> Iterator[RolloutPool]:
    spec = worker_spec(SETTINGS, str(FOLDER), 100)
    pool = kind(spec, num_workers, 1.0, 0.0, limits=PoolLimits(**limits), placement=placement)
    try:
        pool.ready(DEADLINE_S)
        yield pool
    finally:
        pool.close()
        for worker in pool._crew.roster:
            ray.kill(worker.handle)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    assert FOLDER is not None
    prompts = load_prompts(SETTINGS.data, load_tokenizer(FOLDER), SETTINGS.run.seed).train
    sampling = Sampling(NUM_TOKENS, temperature=1.3, seed=5)
    return [
        Request(
            request_uid(5, 1, i % NUM_PROMPTS, i),
            f"{i % NUM_PROMPTS}",
            i % NUM_PROMPTS,
            prompts[i % 4].tokens,
            sampling,
        )
        for i in range(NUM_REQUESTS)
    ]


@pytest.fixture(scope="module")
def weights() -> Any:
    """Of another version: every tensor a little larger."""
    model = load_policy(str(FOLDER), SETTINGS.model.dtype, default_device(0.0), None)
    return {name: tensor * 1.02 for name, tensor in named_weights(model).items()}


def handle_of(weights: dict[str, Any], version: int) -> WeightHandle:
    return WeightPublisher(WeightSpec()).publish({"policy": weights}, version)


def history(rollouts: list[Rollout]) -> list[HistoryRecord]:
    return [HistoryRecord(r.request.prompt_id, 1, r.request.uid, r.tokens) for r in rollouts]


def tokens(rollouts: list[Rollout]) -> Tokens:
    out = {rollout.request.uid: rollout.tokens.tolist() for rollout in rollouts}
    assert len(out) == len(rollouts), "a request came back twice"
    return out


def pid_of(pool: RolloutPool, name: str) -> int:
    return int(pool.workers[name]["pid"])


@contextmanager
def once(condition: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Acts from another thread as soon as the condition holds; it must come to that."""
    failed: list[str] = []

    def watch() -> None:
        until = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > until:
                failed.append("it never came to the fault")
                return
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()
    assert not failed


def busy(pool: RolloutPool, name: str) -> Callable[[], bool]:
    """The worker has requests, and has had the time to begin them."""

    def holds() -> bool:
        if pool._flight.num_held(pool._crew.roster.named(name)) < 3:
            return False
        time.sleep(0.1)
        return True

    return holds


def send(pool: RolloutPool, name: str, number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(pid_of(pool, name), number)


def wait_until_all_serve(pool: RolloutPool) -> None:
    until = time.monotonic() + DEADLINE_S
    while any(worker["state"] != "serving" for worker in pool.workers.values()):
        assert time.monotonic() < until
        pool._crew.tick()
        time.sleep(0.02)


def collect(pool: StreamingPool, num: int) -> list[Rollout]:
    out: list[Rollout] = []
    until = time.monotonic() + DEADLINE_S
    while len(out) < num and time.monotonic() < until:
        out += pool.poll(1.0)
    assert sum(pool.num_in_flight.values()) == 0
    assert pool.poll(0.2) == [], "a request came back twice"
    return out


def test_a_batch_survives_a_killed_worker_and_a_stream_a_stopped_one(
    cluster: None, requests: list[Request], weights: Any
) -> None:
    """kill -9, then SIGSTOP; weights, history and speculation are there again afterwards."""
    one, two = "rollout worker 0", "rollout worker 1"
    with pool_of(StreamingPool, **FAST) as pool:
        assert isinstance(pool, StreamingPool)
        pool.update_policy(handle_of(weights, 7), DEADLINE_S)
        expected = pool.generate(requests, {}, DEADLINE_S).rollouts
        pool.publish(1, history(expected), None, DEADLINE_S)
        pids = {pid_of(pool, one), pid_of(pool, two)}

        with once(busy(pool, two), send(pool, two, signal.SIGKILL)):
            disturbed = pool.generate(requests, {}, DEADLINE_S)
        assert tokens(disturbed.rollouts) == tokens(expected)
        requeued = pool.metrics()["pool/requeued_requests"]
        assert 3 <= requeued <= 8
        wait_until_all_serve(pool)

        pool.submit(requests, {})
        with once(busy(pool, one), send(pool, one, signal.SIGSTOP)):
            rollouts = collect(pool, NUM_REQUESTS)
        assert tokens(rollouts) == tokens(expected)
        assert {int(r.policy_versions[0]) for r in rollouts} == {7}
        wait_until_all_serve(pool)
        metrics = pool.metrics()
        assert (metrics["pool/restarts"], metrics["pool/hung_workers"], metrics["pool/workers"]) == (2, 1, 2)
        assert requeued + 3 <= metrics["pool/requeued_requests"] <= requeued + 8
        assert not pids & {pid_of(pool, one), pid_of(pool, two)}

        # Both are new by now: they serve the weights and draft from the history that they were told.
        pool.report()
        again = pool.generate(requests, {}, DEADLINE_S)
        assert tokens(again.rollouts) == tokens(expected)
        assert [stats.finished > 0 for stats in again.stats] == [True, True]
        assert sum(r.spec.by_source.get("history", 0) for r in again.rollouts) > NUM_REQUESTS * 20


@pytest.mark.slow
def test_a_stream_survives_a_killed_worker(cluster: None, requests: list[Request], weights: Any) -> None:
    """What began anew is of the new version alone; every uid comes back once."""
    one = "rollout worker 0"
    with pool_of(StreamingPool) as pool:
        assert isinstance(pool, StreamingPool)
        pool.submit(requests, {})
        expected = tokens(collect(pool, NUM_REQUESTS))
        pool.submit(requests, {})
        held = pool.num_in_flight
        assert (held[one], held["rollout worker 1"], held["waiting"]) == (8, 8, 8)
        with once(busy(pool, one), send(pool, one, signal.SIGKILL)):
            rollouts = collect(pool, NUM_REQUESTS)
        assert tokens(rollouts) == expected
        pool.submit(requests, {})
        pool.abort([request.uid for request in requests[:4] + requests[-4:]])
        with once(busy(pool, "rollout worker 1"), send(pool, "rollout worker 1", signal.SIGKILL)):
            pool.swap_policy(handle_of(weights, 3), "continue", DEADLINE_S)
            rollouts = collect(pool, NUM_REQUESTS)
        assert len(tokens(rollouts)) == NUM_REQUESTS
        assert sum(rollout.finish == "abort" for rollout in rollouts) == 8
        assert any((rollout.policy_versions == 3).all() for rollout in rollouts if len(rollout.tokens))
        for rollout in rollouts:
            assert (np.diff(rollout.policy_versions) >= 0).all()
        assert pool.metrics()["pool/restarts"] == 2


@pytest.mark.slow
def test_a_request_that_workers_die_of_is_named(cluster: None, requests: list[Request]) -> None:
    """Whoever holds the request is killed."""
    with pool_of(RolloutPool, max_deaths_per_request=2) as pool:
        uid = requests[0].uid

        def holder() -> int | None:
            held = [worker for worker in pool._crew.roster.serving() if uid in pool._flight._held.get(worker, {})]
            return held[0].facts["pid"] if held else None

        def kill_twice() -> None:
            for _ in range(2):
                while (pid := holder()) is None or not Path(f"/proc/{pid}").exists():
                    time.sleep(0.002)
                os.kill(pid, signal.SIGKILL)
                while holder() == pid:
                    time.sleep(0.002)

        with once(lambda: holder() is not None, kill_twice), pytest.raises(PoolError) as raised:
            pool.generate([requests[0]], {}, DEADLINE_S)
    assert f"uid {uid} was held by 2 workers that died" in str(raised.value)
    assert "cluster.max_deaths_per_request=2" in str(raised.value)


@pytest.mark.slow
def test_all_workers_may_die_at_once(cluster: None, requests: list[Request]) -> None:
    with pool_of(RolloutPool) as pool:
        expected = tokens(pool.generate(requests, {}, DEADLINE_S).rollouts)

        def kill_all() -> None:
            for name in pool.workers:
                send(pool, name, signal.SIGKILL)()

        with once(busy(pool, "rollout worker 0"), kill_all):
            assert tokens(pool.generate(requests, {}, DEADLINE_S).rollouts) == expected
        assert pool.metrics()["pool/restarts"] == 2


@pytest.mark.slow
def test_a_pool_that_cannot_come_back_says_so_in_time(cluster: None, requests: list[Request]) -> None:
    """Something else has taken the place of the dead worker."""
    with pool_of(RolloutPool, num_workers=1) as pool:
        # Short only from here on: a loaded machine takes its time to start the first one.
        pool._crew._limits = replace(pool._crew._limits, start_timeout_s=10.0)
        thief: list[Any] = []

        @ray.remote(num_cpus=ray.available_resources()["CPU"] + 1.0)
        class Thief:
            def here(self) -> None:
                """Answers once it has the resources."""

        def rob() -> None:
            thief.append(Thief.remote())
            send(pool, "rollout worker 0", signal.SIGKILL)()

        # Ray gives freed resources to whoever asked first.
        started = time.monotonic()
        with once(busy(pool, "rollout worker 0"), rob), pytest.raises(PoolTimeout) as raised:
            pool.generate(requests, {}, DEADLINE_S)
        ray.kill(thief[0])
    assert "no rollout worker serves: waited 10 s for rollout worker 0 to start" in str(raised.value)
    assert time.monotonic() - started < 90


@pytest.mark.slow
def test_an_error_is_no_death(cluster: None, requests: list[Request]) -> None:
    """Weights that do not fit would never fit: one line, no restart."""
    with pool_of(RolloutPool) as pool:
        with pytest.raises(PoolError, match=r"weights of version 3: rollout worker \d: \w+: .* lack"):
            pool.update_policy(handle_of({}, 3), DEADLINE_S)
        assert pool.metrics()["pool/restarts"] == 0


@pytest.mark.slow
def test_workers_join_and_leave_while_a_stream_runs(cluster: None, requests: list[Request], weights: Any) -> None:
    with pool_of(StreamingPool) as pool:
        assert isinstance(pool, StreamingPool)
        pool.swap_policy(handle_of(weights, 2), "continue", DEADLINE_S)
        pool.submit(requests, {})
        expected = tokens(collect(pool, NUM_REQUESTS))
        assert pool.add_worker() == "rollout worker 2"
        wait_until_all_serve(pool)
        pool.submit(requests, {})
        assert pool.num_in_flight["rollout worker 2"] == 8
        pool.remove_worker("rollout worker 0")
        assert pool.num_in_flight["rollout worker 0"] < 8
        pool.remove_worker("rollout worker 1", drain=False)
        rollouts = collect(pool, NUM_REQUESTS)
        assert tokens(rollouts) == expected
        assert {int(v) for rollout in rollouts for v in rollout.policy_versions} == {2}
        assert pool.workers["rollout worker 0"]["state"] == "leaving"
        assert len(pool.report()) == 2
        assert list(pool.workers) == ["rollout worker 2"]
        with pytest.raises(PoolError, match="last worker"):
            pool.remove_worker("rollout worker 2")
        with pytest.raises(PoolError, match="'rollout worker 9' is no worker of the pool; allowed: rollout worker 2"):
            pool.remove_worker("rollout worker 9")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RolloutPool, StreamingPool])
def test_whoever_comes_in_the_middle_of_an_update_gets_it(
    kind: type[RolloutPool], cluster: None, requests: list[Request], weights: Any
) -> None:
    """A worker begins to serve the old version while another one still prepares the new one."""
    stopped, newcomer = "rollout worker 0", "rollout worker 2"
    with pool_of(kind) as pool:
        pool.update_policy(handle_of(weights, 2), DEADLINE_S)
        pool.add_worker()
        os.kill(pid_of(pool, stopped), signal.SIGSTOP)
        serves = once(lambda: pool._crew.roster.named(newcomer).state == "serving", send(pool, stopped, signal.SIGCONT))
        with serves:
            pool.update_policy(handle_of(weights, 3), DEADLINE_S)
        rollouts = pool.generate(requests, {}, DEADLINE_S).rollouts
        assert {int(v) for rollout in rollouts for v in rollout.policy_versions} == {3}
        assert pool.metrics()["pool/deaths"] == 0


@pytest.mark.slow
def test_whoever_is_told_a_version_that_is_gone_gets_the_newest(
    cluster: None, requests: list[Request], weights: Any
) -> None:
    """A worker that starts is stopped while it is told version 1, whose place version 3 takes meanwhile."""
    publisher = WeightPublisher(WeightSpec("shared_memory"))
    with pool_of(RolloutPool) as pool:
        pool.update_policy(publisher.publish({"policy": weights}, 1), DEADLINE_S)
        newcomer = pool._crew.roster.named(pool.add_worker())
        pid = ray.get(newcomer.handle.ready.remote(), timeout=DEADLINE_S)["pid"]
        os.kill(pid, signal.SIGSTOP)
        while not newcomer.facts:
            pool._crew.tick()
        for version in (2, 3):
            pool.update_policy(publisher.publish({"policy": weights}, version), DEADLINE_S)
        os.kill(pid, signal.SIGCONT)
        wait_until_all_serve(pool)
        rollouts = pool.generate(requests, {}, DEADLINE_S).rollouts
        assert {int(v) for rollout in rollouts for v in rollout.policy_versions} == {3}
        assert pool.metrics()["pool/deaths"] == 0
    publisher.close()


@pytest.mark.slow
def test_a_builder_that_dies_has_a_successor(cluster: None, requests: list[Request]) -> None:
    with pool_of(RolloutPool, num_workers=3) as pool:
        assert pool.share_indexes(DEADLINE_S) == 2
        expected = pool.generate(requests, {}, DEADLINE_S).rollouts
        pool.publish(1, history(expected), None, DEADLINE_S)
        pool.generate(requests, {}, DEADLINE_S)
        with once(busy(pool, "rollout worker 0"), send(pool, "rollout worker 0", signal.SIGKILL)):
            assert tokens(pool.generate(requests, {}, DEADLINE_S).rollouts) == tokens(expected)
        wait_until_all_serve(pool)
        pool._crew.settle("sharing the index", DEADLINE_S)
        folders = [worker.folder for worker in pool._crew.roster]
        assert folders[0] == folders[2] != ""
        assert Path(folders[0]).is_dir()
        assert [bool(pool._crew.sharing.path_for(worker)) for worker in pool._crew.roster] == [True, False, True]
        # What the new builder builds, the others map.
        records = [HistoryRecord(r.request.prompt_id, 2, r.request.uid, r.tokens) for r in expected]
        pool.publish(2, records, None, DEADLINE_S)
        drafted = pool.generate(requests, {}, DEADLINE_S).rollouts
        assert tokens(drafted) == tokens(expected)
        assert sum(r.spec.by_source.get("history", 0) for r in drafted) > NUM_REQUESTS * 20
        assert len(list(Path(folders[0]).glob("*.index"))) == NUM_PROMPTS


def job_with_faults(folder: Path, name: str, *overrides: str, faults: dict[int, signal.Signals]) -> Path:
    """A whole job; after the steps named, one of its workers gets a signal."""
    job = subprocess.Popen(
        command("train", *overrides, f"run.name={name}", "cluster.worker_timeout_s=4"),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    for line in job.stdout:
        step = re.match(r"step +(\d+)/", line)
        if step and int(step[1]) in faults:
            workers = children(job.pid, "ray::StreamingWorker")
            os.kill(workers[int(step[1]) % len(workers)], faults[int(step[1])])
    assert job.stderr is not None
    assert job.wait(DEADLINE_S) == 0, job.stderr.read()
    return folder / "runs" / name


@pytest.mark.slow
def test_a_job_with_faults_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """Synchronous: the same tokens, rewards, losses and memory, with three workers lost on the way."""
    steps = [*SMALL, "algo.num_steps=8", "checkpoint.every_steps=4"]
    run(tmp_path, "train", *steps, "run.name=plain")
    faults = {1: signal.SIGKILL, 3: signal.SIGSTOP, 5: signal.SIGKILL}
    disturbed = job_with_faults(tmp_path, "disturbed", *steps, faults=faults)
    plain = tmp_path / "runs" / "plain"
    assert tokens_of_job(disturbed) == tokens_of_job(plain)
    assert drafter_log(disturbed) == drafter_log(plain)
    expected, metrics = jsonl(plain / "metrics.jsonl"), jsonl(disturbed / "metrics.jsonl")
    same = ("critic/rewards/mean", "actor/pg_loss", "actor/grad_norm", "response_length/mean")
    assert [[record[key] for key in same] for record in metrics] == [
        [record[key] for key in same] for record in expected
    ]
    last = metrics[-1]
    assert (last["pool/deaths"], last["pool/hung_workers"]) == (3, 1)
    assert last["pool/restarts"] == 3
    assert all(record["pool/requeued_requests"] >= 0 for record in metrics)
    assert expected[-1]["pool/deaths"] == 0


@pytest.mark.slow
def test_a_running_job_is_given_other_numbers_of_workers(tmp_path: Path) -> None:
    """`slipstream workers` takes one of three away and brings it back; the samples stay what they are."""
    steps = [*SMALL, "algo.num_steps=8"]
    run(tmp_path, "train", *steps, "run.name=plain")
    overrides = [*steps, "cluster.num_workers=3", "run.name=resized"]
    job = subprocess.Popen(command("train", *overrides), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    said = []
    for line in job.stdout:
        said += re.findall(r"^step (\d+): (\d rollout workers wanted.*)", line)
        for step, num in (("step    1/", 2), ("step    4/", 3)):
            if re.sub(r" +", " ", line).startswith(re.sub(r" +", " ", step)):
                run(tmp_path, "workers", "runs/resized", str(num))
    assert job.wait(DEADLINE_S) == 0
    assert [text for _, text in said] == [
        "2 rollout workers wanted: rollout worker 2 to leave",
        "3 rollout workers wanted: rollout worker 3 to join once Ray has room",
    ]
    metrics = jsonl(tmp_path / "runs" / "resized" / "metrics.jsonl")
    assert metrics[-1]["pool/deaths"] == 0
    assert 2 in [record["pool/workers"] for record in metrics]
    assert tokens_of_job(tmp_path / "runs" / "resized") == tokens_of_job(tmp_path / "runs" / "plain")


@pytest.mark.slow
def test_an_asynchronous_job_with_faults_trains_every_group_once(tmp_path: Path) -> None:
    faults = {1: signal.SIGKILL, 3: signal.SIGSTOP}
    run_dir = job_with_faults(tmp_path, "disturbed", *ASYNC, "algo.num_steps=8", faults=faults)
    metrics = jsonl(run_dir / "metrics.jsonl")
    assert trained_groups(run_dir) == list(range(32))
    counts_add_up(metrics)
    assert metrics[-1]["pool/deaths"] == 2
    assert max(record["training/off_policy/trajectory_staleness_worst/max"] for record in metrics) <= 2


@pytest.mark.slow
def test_actors_keep_their_bundles_and_a_group_that_does_not_fit_says_why(
    cluster: None, requests: list[Request]
) -> None:
    cpus = ray.cluster_resources()["CPU"]
    with pytest.raises(PoolTimeout, match=f"cluster.placement=pack: no room for 1 actors .* need {cpus + 1:g} CPUs"):
        Placement("pack", {"the policy learner": {"CPU": cpus + 1}}, 1.0)
    bundle = {"CPU": 1.0, "GPU": 0.0}
    place = Placement("pack", {worker_name(i): bundle for i in range(2)}, DEADLINE_S)
    with pool_of(RolloutPool, placement=place) as pool:
        expected = tokens(pool.generate(requests, {}, DEADLINE_S).rollouts)
        with once(busy(pool, "rollout worker 1"), send(pool, "rollout worker 1", signal.SIGKILL)):
            assert tokens(pool.generate(requests, {}, DEADLINE_S).rollouts) == expected
        wait_until_all_serve(pool)
        # Beside the reserved ones nobody runs: both the first and the second incarnation have their bundle.
        assert pool.metrics()["pool/restarts"] == 1
        until = time.monotonic() + 30.0
        while ray.available_resources()["CPU"] != cpus - 2:
            assert time.monotonic() < until
            time.sleep(0.2)
    place.remove()
    until = time.monotonic() + 30.0
    while ray.available_resources().get("CPU") != cpus:
        assert time.monotonic() < until
        time.sleep(0.2)

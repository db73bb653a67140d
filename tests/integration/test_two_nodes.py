"""A Ray of two nodes with token authentication: jobs, the check, and who is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.two_raylets import TwoRaylets, two_raylets

pytestmark = pytest.mark.slow  # every test talks to a cluster that takes its time to start

SLIPSTREAM = [sys.executable, "-c", "import sys; from slipstream.trainer.main import main; sys.exit(main())"]
JOB = [
    "experiment=quickstart_short",
    "algo.num_steps=4",
    "data.task.num_train=8",
    "checkpoint.every_steps=2",
    "tracking=disabled",
    "proof.every_steps=0",
]
# A node of 3 cores holds one worker and the learner, a node of 2 the other worker: there is no other way.
ONE_WORKER_PER_NODE = ["cluster.num_workers=2", "cluster.cpus_per_worker=2", "cluster.cpus_for_learner=1"]
NODE_CPUS = (3.0, 2.0)
NO_TOKEN = {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None}


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoRaylets]:
    with two_raylets(NODE_CPUS) as both:
        yield both


def tokens(run_dir: Path) -> dict[tuple[int, int], list[int]]:
    records = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    out = {(record["step"], record["uid"]): record["tokens"] for record in records}
    assert len(out) == len(records)
    return out


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("slipstream:")]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in done.stderr


def test_a_job_over_two_nodes_gives_the_tokens_of_one_node(nodes: TwoRaylets, tmp_path: Path) -> None:
    command = [*nodes.prefix, *SLIPSTREAM, "train", *JOB, *ONE_WORKER_PER_NODE, "run.name=two"]
    with open(tmp_path / "log", "wb") as log:
        job = subprocess.Popen(
            [*command, f"cluster.address={nodes.address}"],
            cwd=tmp_path,
            env=nodes.environment,
            stdout=log,
            stderr=log,
        )
        most = [0, 0]
        deadline = time.monotonic() + 500
        try:
            while job.poll() is None:
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                for node in (0, 1):
                    most[node] = max(most[node], sum("ray::StreamingWorker" in one for one in nodes.processes(node)))
                time.sleep(0.2)
        finally:
            job.kill()
            job.wait(20)
    assert job.returncode == 0, (tmp_path / "log").read_text()
    assert most == [1, 1], "one worker on each node"
    alone = subprocess.run(
        [*SLIPSTREAM, "train", *JOB, "run.name=one", "cluster.num_workers=1"],
        cwd=tmp_path,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    expected = tokens(tmp_path / "runs" / "one")
    assert sum(map(len, expected.values())) >= 2000
    assert tokens(tmp_path / "runs" / "two") == expected
    assert (tmp_path / "runs" / "two" / "checkpoints" / "step_000004" / "COMPLETE").is_file()


def test_the_check_knows_both_nodes_and_finds_nothing(nodes: TwoRaylets, tmp_path: Path) -> None:
    check = [*SLIPSTREAM, "cluster", "check", f"cluster.address={nodes.address}", *ONE_WORKER_PER_NODE]
    done = nodes.run(check, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(nodes.addresses)]
    assert len(rows) == 2, done.stdout
    assert all(" token " in row and row.endswith(" ok") for row in rows)
    assert "2 nodes: all of them can run the job" in done.stdout
    assert list(tmp_path.iterdir()) == [], "a check leaves nothing behind"
    assert Path(nodes.environment["RAY_AUTH_TOKEN_PATH"]).read_text() not in done.stdout + done.stderr


def test_the_check_names_what_falls_short(nodes: TwoRaylets, tmp_path: Path) -> None:
    demands = ["cluster.num_workers=9", "cluster.gpus_for_learner=1"]
    done = nodes.run([*SLIPSTREAM, "cluster", "check", f"cluster.address={nodes.address}", *demands], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the job asks for 10 CPUs" in done.stdout
    asked = "the job asks for 1 GPUs (cluster.num_workers=9, cluster.num_learners=1)"
    assert f"{asked}, the Ray cluster has 0" in done.stdout
    assert "2 nodes, 2 problems" in done.stdout


def test_without_the_token_nobody_comes_in(nodes: TwoRaylets, tmp_path: Path) -> None:
    train = [*SLIPSTREAM, "train", *JOB, f"cluster.address={nodes.address}", "cluster.allow_unauthenticated=true"]
    done = nodes.run(train, tmp_path, RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH=None)
    one_line(done, nodes.address, "RAY_AUTH_TOKEN_PATH")
    assert "0" * 64 not in done.stdout + done.stderr
    one_line(nodes.run(train, tmp_path, **NO_TOKEN), nodes.address, "RAY_AUTH_TOKEN_PATH")


def test_a_ray_that_asks_for_no_token_is_refused(tmp_path: Path) -> None:
    with two_raylets(NODE_CPUS, authenticated=False) as nodes:
        train = [*SLIPSTREAM, "train", *JOB, *ONE_WORKER_PER_NODE, f"cluster.address={nodes.address}"]
        one_line(nodes.run(train, tmp_path), nodes.address, "RAY_AUTH_MODE=disabled", "cluster.allow_unauthenticated")
        # A token on this side alone protects nobody: the nodes are asked.
        done = nodes.run(train, tmp_path, RAY_AUTH_MODE="token")
        one_line(done, "token authentication is off on", f"{nodes.addresses[1]} (disabled)")
        check = [*SLIPSTREAM, "cluster", "check", *ONE_WORKER_PER_NODE, f"cluster.address={nodes.address}"]
        done = nodes.run(check, tmp_path, RAY_AUTH_MODE="token")
        one_line(
            done, "RAY_AUTH_MODE=token here, but not on", *(f"{address} (disabled)" for address in nodes.addresses)
        )
        assert not list(tmp_path.glob("runs/*/rollouts.jsonl"))
        allowed = nodes.run([*train, "cluster.allow_unauthenticated=true", "algo.num_steps=1"], tmp_path)
        assert allowed.returncode == 0, allowed.stdout + allowed.stderr

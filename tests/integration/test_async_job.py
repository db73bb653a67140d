"""Jobs that collect rollouts as they finish: the bound, the counts, a kill in between, evaluation, and a stall.

Every job starts a Ray of its own. What unit tests hold as well is slow here: drain, positions, refills, extra groups
and the watchdog.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_job import DEADLINE_S, SMALL, command, jsonl, one_line, run, tokens

ASYNC = [*SMALL, "algo.num_steps=6", "algo.max_staleness_steps=2"]


def trained_groups(run_dir: Path) -> list[int]:
    """The group numbers of the job in order of training, each checked to be whole."""
    records = jsonl(run_dir / "rollouts.jsonl")
    groups: dict[int, list[int]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record["step"])
    assert all(len(steps) == 8 and len(set(steps)) == 1 for steps in groups.values()), "a group was split or repeated"
    assert len({record["uid"] for record in records}) == len(records), "a uid was trained on twice"
    return sorted(groups)


def counts_add_up(metrics: list[dict]) -> None:
    for record in metrics:
        left = ("trained", "in_training", "closed", "dropped_uniform", "open")
        assert record["async/groups_admitted"] == sum(record[f"async/groups_{name}"] for name in left)


@pytest.mark.parametrize("in_flight", ["continue", pytest.param("drain", marks=pytest.mark.slow)])
def test_generation_runs_ahead_within_the_bound(tmp_path: Path, in_flight: str) -> None:
    evaluation = ["evaluation.every_steps=3", "evaluation.at_start=true", "evaluation.max_prompts=4"]
    run(tmp_path, "train", *ASYNC, *evaluation, "run.name=ahead", f"algo.in_flight={in_flight}")
    metrics = jsonl(tmp_path / "runs" / "ahead" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 7))
    stalest = [record["training/off_policy/trajectory_staleness_worst/max"] for record in metrics]
    assert max(stalest) == 2
    assert stalest[0] == 0
    if in_flight == "drain":
        assert all(record["training/off_policy/trajectory_spans/max"] == 1 for record in metrics)
    assert trained_groups(tmp_path / "runs" / "ahead") == list(range(24))
    counts_add_up(metrics)
    assert metrics[-1]["async/groups_left"] == 0
    assert all("rollout_corr/rollout_is_mean" in record for record in metrics)
    assert all(record["das/stolen_requests"] >= 0 for record in metrics)
    evaluated = {record["val-aux/step"] for record in metrics if "val-aux/step" in record}
    assert {6} <= evaluated <= {0, 3, 6}


@pytest.mark.slow  # the README's command on fewer prompts and steps
def test_the_quickstart_learns_two_steps_ahead(tmp_path: Path) -> None:
    small = ["data.task.num_train=16", "algo.num_steps=24", "algo.warmup_steps=4", "tracking=disabled"]
    done = run(tmp_path, "train", "experiment=quickstart", "algo=grpo_async", *small, "run.name=ahead")
    metrics = jsonl(tmp_path / "runs" / "ahead" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 25))
    assert max(record["training/off_policy/trajectory_staleness_worst/max"] for record in metrics) == 2
    assert trained_groups(tmp_path / "runs" / "ahead") == list(range(4 * 24))
    counts_add_up(metrics)
    rewards = [record["critic/rewards/mean"] for record in metrics]
    assert sum(rewards[-4:]) > sum(rewards[:4]), "four steps are an epoch: the same prompts"
    assert "report: " in done.stdout


@pytest.mark.slow
def test_a_killed_job_trains_every_group_once(tmp_path: Path) -> None:
    job = subprocess.Popen(command("train", *ASYNC, "run.name=killed"), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    for line in job.stdout:
        if re.match(r"step\s+2/", line):
            break
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    run_dir = tmp_path / "runs" / "killed"
    run(tmp_path, "train", "--resume", str(run_dir))
    assert trained_groups(run_dir) == list(range(24))
    assert [record["step"] for record in jsonl(run_dir / "metrics.jsonl")] == list(range(1, 7))


@pytest.mark.slow
def test_staleness_zero_with_refills_is_deterministic_and_on_policy(tmp_path: Path) -> None:
    """Dynamic sampling: no group that is trained on is uniform, and the same ones are found by one worker."""
    refill = [*SMALL, "algo=dapo"]
    run(tmp_path, "train", *refill, "run.name=two")
    run(tmp_path, "train", *refill, "run.name=one", "cluster.num_workers=1", "cluster.routing=group")
    run_dir = tmp_path / "runs" / "two"
    metrics = jsonl(run_dir / "metrics.jsonl")
    assert tokens(run_dir) == tokens(tmp_path / "runs" / "one")
    assert metrics[-1]["async/groups_dropped_uniform"] > 0
    assert all(record["critic/groups_uniform"] == 0 for record in metrics)
    assert all(record["training/off_policy/trajectory_staleness_worst/max"] == 0 for record in metrics)
    counts_add_up(metrics)


@pytest.mark.slow
def test_extra_groups_are_closed_early_and_counted(tmp_path: Path) -> None:
    run(tmp_path, "train", *SMALL, "run.name=extra", "algo.num_extra_groups=2")
    metrics = jsonl(tmp_path / "runs" / "extra" / "metrics.jsonl")
    assert metrics[-1]["async/groups_closed"] == 2 * len(metrics)
    counts_add_up(metrics)
    assert len(trained_groups(tmp_path / "runs" / "extra")) == 4 * len(metrics)


@pytest.mark.slow
def test_a_hung_worker_ends_the_job_with_everybodys_stacks(tmp_path: Path) -> None:
    stall = ["watchdog.timeout_s=8", "algo.num_steps=500", "run.name=hung"]
    job = subprocess.Popen(
        command("train", *ASYNC, *stall), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    for line in job.stdout:
        if re.match(r"step\s+2/", line):
            break
    else:
        raise AssertionError(job.communicate()[1])
    workers = children(job.pid, "ray::StreamingWorker")
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        _, errors = job.communicate(timeout=DEADLINE_S)
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    done = subprocess.CompletedProcess(job.args, job.returncode, "", errors)
    one_line(done, "no progress for", "watchdog.timeout_s=8", "stall.txt")
    text = (tmp_path / "runs" / "hung" / "stall.txt").read_text()
    assert "rollout worker 0, no answer within" in text
    assert "the policy learner, process" in text
    assert "groups waited for" in text
    assert re.search(r"uids in flight: \[\d+", text)


def children(pid: int, title: str) -> list[int]:
    """Descendants of a process whose command line starts with `title`."""
    parent_of, title_of = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent_of[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                title_of[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
    found, level = [], {pid}
    while level:
        level = {child for child, parent in parent_of.items() if parent in level}
        found += [child for child in sorted(level) if title_of.get(child, "").startswith(title)]
    return found

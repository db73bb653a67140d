"""The real job: real Ray, real processes killed, the `slipstream` command as a user types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from slipstream.drafter.token_log import TokenLog

SMALL = [
    "experiment=quickstart_short",
    "algo.num_steps=4",
    "data.task.num_train=8",
    "checkpoint.every_steps=1",
    "tracking=disabled",
    "proof.every_steps=0",
]
DEADLINE_S = 150


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from slipstream.trainer.main import main; sys.exit(main())", *overrides]


def run(folder: Path, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*overrides), cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokens(run_dir: Path) -> dict[tuple[int, int], list[int]]:
    records = jsonl(run_dir / "rollouts.jsonl")
    out = {(record["step"], record["uid"]): record["tokens"] for record in records}
    assert len(out) == len(records), "a rollout was logged twice"
    return out


def drafter_log(run_dir: Path) -> list[tuple]:
    """Every record in the drafter's log, in order."""
    log = TokenLog.open(run_dir / "history")
    out = [(r.prompt_id, r.step, r.uid, r.tokens.tolist(), r.reward, r.version) for r in log.records()]
    assert log.num_bytes_cut == 0
    log.close()
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on two workers, never interrupted."""
    folder = tmp_path_factory.mktemp("job")
    run(folder, "train", *SMALL, "run.name=plain")
    return folder / "runs" / "plain"


def test_the_short_quickstart_shows_what_it_promises(tmp_path: Path) -> None:
    done = run(tmp_path, "train", "experiment=quickstart_short", "run.name=short")
    run_dir = tmp_path / "runs" / "short"
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    metrics = jsonl(run_dir / "metrics.jsonl")
    assert len(lines) == len(metrics) > 3
    for word in ("reward", "length", "rollout", "accepted/round", "tok/s", "left"):
        assert word in lines[0]
    proofs = [record for record in metrics if "proof/tokens_compared" in record]
    assert len(proofs) >= 2
    assert all(record["proof/tokens_different"] == 0 for record in proofs)
    assert sum(record["proof/tokens_compared"] for record in proofs) >= 2000
    assert sum(record["das/accepted_history"] for record in metrics) > 0
    assert all(record["training/rollout_logprobs_diff_mean"] < 1e-4 for record in metrics)
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/png;base64") == 6
    assert (run_dir / "checkpoints").is_dir()
    assert list(run_dir.glob("wandb/offline-run-*")), "W&B is offline by default"


def test_a_killed_job_resumes_with_the_same_tokens(tmp_path: Path, undisturbed: Path) -> None:
    job = subprocess.Popen(command("train", *SMALL, "run.name=killed"), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    for line in job.stdout:
        if re.match(r"step\s+2/", line):
            break
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    run_dir = tmp_path / "runs" / "killed"
    with (run_dir / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 3, "critic/rew')
    with (run_dir / "history" / "000001.log").open("ab") as torn_log:
        torn_log.write(b"half a record")
    done = run(tmp_path, "train", "--resume", str(run_dir))
    assert "resume:" in done.stdout
    assert tokens(run_dir) == tokens(undisturbed)
    steps = [record["step"] for record in jsonl(run_dir / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]
    # The drafter's memory came back too: the first step after the resume drafts from history.
    resumed = next(r for r in jsonl(run_dir / "metrics.jsonl") if r["step"] == 3)
    assert resumed["das/accepted_history"] > 0
    assert drafter_log(run_dir) == drafter_log(undisturbed)
    records = {(r["step"], r["uid"]): r for r in jsonl(run_dir / "rollouts.jsonl")}
    for _, step, uid, response, reward, version in drafter_log(run_dir):
        record = records.pop((step, uid))
        assert (response, reward) == (record["tokens"], record["reward"])
        assert version == record["policy_version"] == step - 1
    assert not records


@pytest.mark.slow  # three starts of a job
def test_a_kill_while_a_checkpoint_is_being_written(tmp_path: Path, undisturbed: Path) -> None:
    """The first kill comes with nothing complete, the second with one, which stays."""
    folder = tmp_path / "runs" / "killed" / "checkpoints"
    for num_complete in (0, 1):
        resume = ["--resume", str(folder.parent)] if num_complete else [*SMALL, "run.name=killed"]
        with open(tmp_path / "log", "w") as log:
            job = subprocess.Popen(command("train", *resume), cwd=tmp_path, stdout=log, stderr=log)
        deadline = time.monotonic() + DEADLINE_S
        while not (list(folder.glob(".partial-*")) and len(list(folder.glob("step_*"))) >= num_complete):
            assert job.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        assert all((path / "COMPLETE").is_file() for path in folder.glob("step_*"))
    done = run(tmp_path, "train", "--resume", str(folder.parent))
    assert re.search(r"resume: .*step_00000\d \(step \d\)", done.stdout)
    assert tokens(folder.parent) == tokens(undisturbed)
    assert [record["step"] for record in jsonl(folder.parent / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [path.name for path in sorted(folder.iterdir())] == ["step_000003", "step_000004"]


def test_a_resume_says_what_it_takes_and_passes_over(tmp_path: Path, undisturbed: Path) -> None:
    run_dir = tmp_path / "runs" / "rotten"
    shutil.copytree(undisturbed, run_dir)
    newest = run_dir / "checkpoints" / "step_000004" / "policy" / "model.safetensors"
    rotten = bytearray(newest.read_bytes())
    rotten[-1] ^= 1
    newest.write_bytes(rotten)
    shutil.rmtree(run_dir / "history")
    done = run(tmp_path, "train", "--resume", str(run_dir), "algo.num_steps=5", check=False)
    assert "step_000004 is damaged: the checksum of policy/model.safetensors differs; it is passed over" in done.stderr
    one_line(done, "step_000003 cannot be resumed")


def test_a_resume_without_the_drafters_log_is_one_line(tmp_path: Path, undisturbed: Path) -> None:
    run_dir = tmp_path / "runs" / "copied"
    shutil.copytree(undisturbed, run_dir, ignore=shutil.ignore_patterns("history"))
    done = run(tmp_path, "train", "--resume", str(run_dir), "algo.num_steps=5", check=False)
    assert done.returncode == 1
    one_line(done, "step_000004 cannot be resumed", str(run_dir / "history"), "mkdir")


@pytest.mark.slow  # whole jobs of what the pool's tests show without one
@pytest.mark.parametrize(
    "change", [["cluster.num_workers=1", "drafter=ngram"], ["drafter=off", "engine.max_live_requests=5"]], ids=str
)
def test_workers_and_drafters_change_no_token(change: list[str], tmp_path: Path, undisturbed: Path) -> None:
    run(tmp_path, "train", *SMALL, "run.name=other", *change)
    expected = tokens(undisturbed)
    assert sum(map(len, expected.values())) >= 2000
    assert tokens(tmp_path / "runs" / "other") == expected


@pytest.mark.slow  # whole jobs of what test_pool.py shows with a pool
@pytest.mark.parametrize("steal", [True, False])
def test_queued_requests_move_between_workers_and_change_no_token(
    steal: bool, tmp_path: Path, undisturbed: Path
) -> None:
    """Slots for a few requests of each worker; with the switch off nothing moves."""
    few = ["engine.max_live_requests=3", f"cluster.steal={str(steal).lower()}"]
    run(tmp_path, "train", *SMALL, "run.name=few", *few)
    moved = [record["das/stolen_requests"] for record in jsonl(tmp_path / "runs" / "few" / "metrics.jsonl")]
    assert (sum(moved) > 0) == steal
    assert tokens(tmp_path / "runs" / "few") == tokens(undisturbed)


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["ctrl_c", "sigterm"]
)
def test_an_interrupt_ends_in_one_line_and_leaves_nothing_behind(sent: signal.Signals, tmp_path: Path) -> None:
    job = subprocess.Popen(
        command("train", *SMALL, "algo.num_steps=500", "run.name=stopped"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("step"):
            break
    job.send_signal(sent)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "carry on: slipstream train --resume" in errors
    assert "Traceback" not in errors


def test_a_bad_reward_function_costs_its_samples_only(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    n = sum(map(ord, solution_str))\n"
        "    if n % 3 == 0:\n"
        "        raise RuntimeError('no such luck')\n"
        "    return float('nan') if n % 3 == 1 else 1.0 / n\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    reward = ["reward.rule=custom", "reward.function=my_rewards.score", "data.max_prompt_tokens=50"]
    done = subprocess.run(
        command("train", *SMALL, "run.name=bad", "algo.num_steps=2", *reward),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out of the loss" in done.stderr
    assert "no such luck" in done.stderr
    assert re.search(r"train: \d+ rows left out", done.stderr), "prompts that are too long are counted"
    metrics = jsonl(tmp_path / "runs" / "bad" / "metrics.jsonl")
    assert all(0 < record["das/samples_left_out"] < 32 for record in metrics)
    assert any(record["reward"] is None for record in jsonl(tmp_path / "runs" / "bad" / "rollouts.jsonl"))


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("slipstream:")]
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in done.stderr


def test_a_dead_ray_address_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = time.monotonic()
    done = run(tmp_path, "train", *SMALL, f"cluster.address={address}", check=False)
    assert done.returncode == 1
    one_line(done, address, "ray start")
    assert time.monotonic() - started < 60


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        done = run(tmp_path, "train", *SMALL, "cluster.dashboard=true", f"cluster.dashboard_port={port}", check=False)
    assert done.returncode == 1
    one_line(done, "cluster.dashboard_port", str(port))


@pytest.mark.slow  # whole jobs of what test_learner_group.py shows with learners
def test_two_learners_train_a_job_and_one_goes_on(tmp_path: Path) -> None:
    """The rollouts of step 1 come before any update; a checkpoint of two learners is one learner's, too."""
    run(tmp_path, "train", *SMALL, "run.name=one", "algo.num_steps=2")
    run(tmp_path, "train", *SMALL, "run.name=two", "algo.num_steps=2", "cluster.num_learners=2")
    one, two = (jsonl(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    first = {key: value for key, value in tokens(tmp_path / "runs" / "one").items() if key[0] == 1}
    assert first == {key: value for key, value in tokens(tmp_path / "runs" / "two").items() if key[0] == 1}
    for name in ("actor/pg_loss", "actor/grad_norm", "actor/entropy"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-5)
    assert all(record["training/rollout_logprobs_diff_mean"] < 1e-4 for record in two)
    done = run(tmp_path, "train", "--resume", "runs/two", "cluster.num_learners=1", "algo.num_steps=3")
    assert "resume:" in done.stdout
    last = jsonl(tmp_path / "runs" / "two" / "metrics.jsonl")[-1]
    assert last["step"] == 3
    assert last["training/rollout_logprobs_diff_mean"] < 1e-4

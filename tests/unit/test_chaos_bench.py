"""The chaos bench without a job: its schedule, its accounts, its disk and how it finds and judges processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.token_log import TokenLog
from slipstream.experiments.chaos.accounting import compare, expected_keys, read_books
from slipstream.experiments.chaos.faults import KINDS, make_schedule
from slipstream.experiments.chaos.processes import command_line, descendants, kill_tree, wait_for_call
from slipstream.experiments.chaos.reward import HANG_VARIABLE, score
from slipstream.experiments.chaos.run import summarize
from slipstream.experiments.chaos.small_disk import SmallDisk
from slipstream.experiments.chaos.supervisor import Outcome
from slipstream.experiments.chaos.train_process import TrainProcess

EXPECTED = expected_keys(0, 2, 1, 2)


def write_run(folder: Path, drop: int | None = None, twice: int | None = None, change: int | None = None) -> Path:
    """Two steps of one group of two; `drop`, `twice` and `change` are places of rollouts."""
    folder.mkdir()
    log = TokenLog.create(folder / "history")
    lines = []
    for place, (step, uid) in enumerate(sorted(EXPECTED)):
        tokens = [place, 7 if place != change else 8, 9]
        record = {"step": step, "uid": uid, "tokens": tokens, "reward": 1.0}
        if place != drop:
            lines += [json.dumps(record)] * (2 if place == twice else 1)
            log.append([HistoryRecord("p", step, uid, np.array(tokens, np.int32), reward=1.0, version=step - 1)])
    log.close()
    (folder / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    return folder


def test_accounts_find_what_is_lost_repeated_or_different(tmp_path: Path) -> None:
    plain = read_books(write_run(tmp_path / "plain"))
    same = compare(EXPECTED, plain, plain)
    assert same == dict.fromkeys(same, 0) | {"tokens_compared": 12}
    lost = compare(EXPECTED, plain, read_books(write_run(tmp_path / "lost", drop=1)))
    assert (lost["lost"], lost["duplicated"]) == (2, 0), "neither among the rollouts nor in the drafter's log"
    assert lost["tokens_different"] == 6
    twice = compare(EXPECTED, plain, read_books(write_run(tmp_path / "twice", twice=2)))
    assert (twice["lost"], twice["duplicated"], twice["tokens_different"]) == (0, 1, 0)
    changed = compare(EXPECTED, plain, read_books(write_run(tmp_path / "changed", change=3)))
    assert (changed["lost"], changed["tokens_different"]) == (0, 2)
    (tmp_path / "plain" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1}\n')
    steps = compare(EXPECTED, plain, read_books(tmp_path / "plain"))
    assert (steps["lost"], steps["duplicated"]) == (1, 1)


def test_a_schedule_is_seeded_and_misses_no_kind() -> None:
    kinds = list(KINDS)
    schedule = make_schedule(3, 33, 5, 4, kinds)
    assert schedule == make_schedule(3, 33, 5, 4, kinds) != make_schedule(4, 33, 5, 4, kinds)
    assert [fault.at_step for fault in schedule] == list(range(5, 5 + 33 * 4, 4))
    assert {fault.kind for fault in schedule} == set(kinds)
    assert len({fault.kind for fault in make_schedule(3, 5, 5, 4, kinds)}) == 5


def test_a_full_disk_is_full_and_then_free_again(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk")
    try:
        disk.fill(4096, [os.getpid()])
        with pytest.raises(OSError, match=r"No space left|File too large") as error:
            (disk.folder / "large").write_bytes(bytes(1 << 20))
        assert error.value.errno == (errno.ENOSPC if disk.kind.startswith("tmpfs") else errno.EFBIG)
        disk.free()
        (disk.folder / "large").write_bytes(bytes(1 << 20))
        (disk.folder / "large").unlink()
    finally:
        disk.close()
    assert not any((tmp_path / "disk").iterdir())


def test_a_tree_of_processes_is_found_and_killed() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()', 'ray::Some.call'])"
    root = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    while len(found := descendants([root.pid])) < 2 or not command_line(found[1]).endswith("call"):
        assert root.poll() is None
    assert found[0] == root.pid
    assert wait_for_call(found, "call", 5.0) == found[1]
    assert wait_for_call(found, "other", 0.05) is None
    kill_tree(root.pid)
    assert root.wait(10) == -signal.SIGKILL
    while command_line(found[1]):
        pass
    assert descendants(found) == []


def test_a_reward_hangs_once_where_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("slipstream/chain_sum", "#### 4", "4")
    assert score(*arguments) == 1.0
    flag = tmp_path / "hang"
    flag.touch()
    code = f"from slipstream.experiments.chaos.reward import score; score(*{arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {HANG_VARIABLE: str(flag)})
    while flag.exists():
        assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.kill()
    process.wait()
    monkeypatch.setenv(HANG_VARIABLE, str(flag))
    assert score(*arguments) == 1.0


@pytest.mark.parametrize(
    ("said", "clear"),
    [
        ("(raylet) a worker died\nslipstream: checkpoint x cannot be written\n", True),
        ("slipstream: one\nslipstream: two\n", False),
        ("Traceback (most recent call last):\nslipstream: one\n", False),
        ("", False),
    ],
)
def test_a_stop_is_clear_when_one_line_says_why(said: str, clear: bool, tmp_path: Path) -> None:
    job = TrainProcess([], tmp_path / "run", tmp_path, os.environ)
    (tmp_path / "life-000.err").write_text(said)
    assert (job.stop_line() is not None) == clear
    assert job.step == 0


def test_the_summary_counts_by_kind() -> None:
    first, second, third = make_schedule(0, 3, 1, 1, ["kill_driver"])
    outcomes = [
        Outcome(first, 1, ended="resumed", stops=["killed"], standstill_s=4.0),
        Outcome(second, 2, ended="resumed", stops=["unclear: exit code 1"], standstill_s=6.0),
        Outcome(third, 3, standstill_s=1.0),
    ]
    summary = summarize(outcomes)
    assert (summary["recovered"], summary["resumed"], summary["unclear_stops"], summary["hung"]) == (1, 2, 1, 0)
    assert summary["kinds"] == {
        "kill_driver": {
            "faults": 3,
            "recovered": 1,
            "resumed": 2,
            "standstill_s_median": 4.0,
            "standstill_s_max": 6.0,
        }
    }

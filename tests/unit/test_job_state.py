"""A resumed job remembers what the checkpoint's job remembered, whatever happened to the log behind the checkpoint."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.history import HistoryLog
from slipstream.drafter.token_log import TokenLog
from slipstream.trainer import checkpoint
from slipstream.trainer.errors import CheckpointError
from slipstream.trainer.job_state import JobState

WINDOW = 2
SAMPLES = 3


def rollouts(step: int) -> list[HistoryRecord]:
    """The samples of a step, a pure function of it: prompts take turns, three of them."""
    return [
        HistoryRecord(f"p{step % 3}", step, 10 * step + i, np.arange(i + 1, dtype=np.int32), float(i), step - 1)
        for i in range(SAMPLES)
    ]


def run_steps(state: JobState, *steps: int) -> None:
    for step in steps:
        state.remember(rollouts(step))
        state.observe_lengths([record.prompt_id for record in rollouts(step)], np.arange(SAMPLES))
        state.step = step


def save(state: JobState, run_dir: Path, keep_last: int = 9) -> Path:
    snapshot = state.snapshot()
    path = checkpoint.save(run_dir, state.step, snapshot.save, keep_last)
    state.drop_forgotten(snapshot)
    return path


def remembered(history: HistoryLog) -> list[tuple]:
    names = sorted({record.prompt_id for record in history})
    visits = [record for name in names for visit in history.visits(name) for record in visit]
    return [(r.prompt_id, r.step, r.uid, r.tokens.tolist(), r.reward, r.version) for r in visits]


def window_after(step: int) -> list[tuple]:
    history = HistoryLog(WINDOW)
    for earlier in range(1, step + 1):
        history.add(rollouts(earlier))
    return remembered(history)


def test_a_resumed_job_remembers_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    state = JobState.start(tmp_path, WINDOW)
    state.wandb_run_id = "abc"
    run_steps(state, *range(1, 9))
    path = save(state, tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["COMPLETE", "job.json"]
    # Two more steps, and a record that the kill tore: all of it is sampled again.
    run_steps(state, 9, 10)
    lengths = dict(state.predicted_lengths)
    with open(tmp_path / "history" / "000001.log", "ab") as log:
        log.write(b"\x40\0\0\0torn")
    resumed = JobState.load(path, tmp_path, WINDOW)
    assert (resumed.step, resumed.wandb_run_id) == (8, "abc")
    assert remembered(resumed.history) == window_after(8)
    run_steps(resumed, 9, 10)
    assert resumed.predicted_lengths == lengths
    assert remembered(resumed.history) == window_after(10)
    again = JobState.load(save(resumed, tmp_path), tmp_path, WINDOW)
    assert [record.uid for record in again.log.records()] == [r.uid for step in range(1, 11) for r in rollouts(step)]


def test_a_job_without_a_checkpoint_starts_with_nothing_remembered(tmp_path: Path) -> None:
    state = JobState.start(tmp_path, WINDOW)
    run_steps(state, 1, 2)
    state.log.close()
    again = JobState.start(tmp_path, WINDOW)
    assert list(again.history) == list(again.log.records()) == []
    run_steps(again, 1)
    assert remembered(JobState.load(save(again, tmp_path), tmp_path, WINDOW).history) == window_after(1)


def test_the_log_sheds_what_the_window_forgot_and_checkpoints_stay_good(tmp_path: Path) -> None:
    state = JobState.start(tmp_path, WINDOW)
    state.log.close()
    state.log = TokenLog.create(tmp_path / "history", max_segment_bytes=500)
    paths = {}
    for step in range(1, 31):
        run_steps(state, step)
        paths[step] = save(state, tmp_path, keep_last=30)
    segments = sorted(file.name for file in (tmp_path / "history").iterdir())
    assert segments[0] > "000005.log"
    assert segments[-1] == "000015.log", "two steps a segment"
    state.log.close()
    # From the newest to the oldest: each resume cuts off what the older ones do not need.
    for step in range(30, 0, -1):
        resumed = JobState.load(paths[step], tmp_path, WINDOW)
        found, expected = remembered(resumed.history), window_after(step)
        # The newest remembers all; an older one may be colder, and never remembers anything else.
        assert found == expected if step == 30 else all(record in expected for record in found)
        assert len(found) > 0 or step < 26
        run_steps(resumed, step + 1)
        resumed.log.close()


def test_the_window_knows_what_it_holds() -> None:
    history = HistoryLog(WINDOW)
    for step in range(1, 8):
        history.add(rollouts(step))
    assert [step for step in range(1, 9) if history.remembers(rollouts(step)[0])] == [2, 3, 4, 5, 6, 7]


def test_a_log_that_cannot_be_dropped_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = JobState.start(tmp_path, WINDOW)
    state.log.close()
    state.log = TokenLog.create(tmp_path / "history", max_segment_bytes=500)
    run_steps(state, *range(1, 10))
    (tmp_path / "history" / "000001.log").write_bytes(b"rot")
    save(state, tmp_path)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "000001.log: byte 0" in warning


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (shutil.rmtree, "history: byte 0: no segment lies here"),
        (lambda folder: (folder / "000001.log").write_bytes(b""), "000001.log: byte 0: the segment starts with"),
        (lambda folder: (folder / "000001.log").write_bytes(b"sliplog\n\1\0\0\0"), "byte 12: the segment ends here"),
    ],
    ids=["missing", "corrupt", "short"],
)
def test_a_log_that_does_not_fit_is_one_line_that_says_how_to_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], fault: str
) -> None:
    run_dir = tmp_path / "my run"
    state = JobState.start(run_dir, WINDOW)
    run_steps(state, 1, 2)
    older = save(state, run_dir)
    run_steps(state, 3)
    path = save(state, run_dir)
    state.log.close()
    damage(run_dir / "history")
    with pytest.raises(CheckpointError) as caught:
        JobState.load(path, run_dir, WINDOW)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path} cannot be resumed: {run_dir / 'history'}")
    assert fault in line
    command = line.partition("starts cold: ")[2]
    assert shlex.quote(str(run_dir / "history")) in command
    subprocess.run(command, shell=True, check=True, timeout=10)
    cold = JobState.load(path, run_dir, WINDOW)
    assert "starts cold" in caplog.text
    assert (cold.step, list(cold.history)) == (3, [])
    run_steps(cold, 4)
    cold.log.close()
    # Neither position lies in the new log: both checkpoints can be resumed, cold.
    for resumed in (JobState.load(path, run_dir, WINDOW), JobState.load(older, run_dir, WINDOW)):
        assert list(resumed.history) == list(resumed.log.records()) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"log_end": None}, "job.json cannot be read: "),
        ({"log_end": [1]}, "job.json cannot be read: "),
        ({"step": ...}, "job.json cannot be read: it has no 'step'"),
        ({"log_end": ...}, "job.json cannot be read: it has no 'log_end'"),
    ],
)
def test_a_state_that_cannot_be_read_is_one_line(tmp_path: Path, change: dict, fault: str) -> None:
    state = JobState.start(tmp_path, WINDOW)
    file = save(state, tmp_path) / "job.json"
    content = {k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not ...}
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        JobState.load(file.parent, tmp_path, WINDOW)
    (line,) = str(caught.value).splitlines()
    assert fault in line


FULL_DISK_JOB = """
import resource, sys
from pathlib import Path
import numpy as np
from slipstream.drafter.base import HistoryRecord
from slipstream.trainer.errors import CheckpointError
from slipstream.trainer.job_state import JobState
state = JobState.start(Path(sys.argv[1]), 4)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    state.remember([HistoryRecord("p", 1, 1, np.arange(1000, dtype=np.int32))])
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK_JOB, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == [f"{tmp_path / 'history'} cannot be written: File too large"], done.stderr


def test_the_log_is_on_disk_before_the_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    state = JobState.start(tmp_path, WINDOW)
    run_steps(state, 1)
    monkeypatch.setattr(os, "fsync", record)
    save(state, tmp_path)
    assert synced[0] == "000001.log"
    assert "COMPLETE" in synced


def test_the_groups_that_were_started_come_back(tmp_path: Path) -> None:
    state = JobState.start(tmp_path, WINDOW)
    run_steps(state, 1)
    state.next_group, state.outstanding_groups = 11, [4, 7, 10]
    again = JobState.load(save(state, tmp_path), tmp_path, WINDOW)
    assert (again.next_group, again.outstanding_groups) == (11, [4, 7, 10])

"""Tracker: strict JSONL, torn lines, truncation on resume, and a quiet, local Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slipstream.conf.schema import TrackingConfig
from slipstream.trainer.errors import SlipstreamError
from slipstream.trainer.tracking import Tracker, read_jsonl

DISABLED = TrackingConfig(mode="disabled")


def test_one_strict_json_object_per_step(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, {}, DISABLED)
    tracker.log({"critic/rewards/mean": np.float32(0.5), "actor/grad_norm": math.nan, "a": math.inf}, step=1)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line.endswith("\n")
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["step"] == 1
    assert record["critic/rewards/mean"] == 0.5
    assert record["actor/grad_norm"] is None
    assert record["tracking/num_nonfinite"] == 2
    assert tracker.wandb_run_id is None


def test_rollouts_may_hold_numpy_and_nan(tmp_path: Path) -> None:
    tokens = np.arange(3, dtype=np.int32)
    record = {
        "step": np.int64(1),
        "tokens": tokens,
        "reward": np.float32(math.nan),
        "spec": {"by_source": {"self": 2}},
    }
    Tracker(tmp_path, {}, DISABLED).log_rollouts([record, {"step": 1, "tokens": [1, 2], "reward": 1.0}])
    records, num_bad = read_jsonl(tmp_path / "rollouts.jsonl")
    assert num_bad == 0
    assert records[0] == {"step": 1, "tokens": [0, 1, 2], "reward": None, "spec": {"by_source": {"self": 2}}}
    assert records[1]["reward"] == 1.0


def test_a_torn_line_is_counted_and_spoils_nothing_else(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, {}, DISABLED)
    tracker.log({"x": 1}, step=1)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "x"')
    assert read_jsonl(path) == ([json.loads(path.read_text().splitlines()[0])], 1)
    tracker.log({"x": 3}, step=3)
    records, num_bad = read_jsonl(path)
    assert [record["step"] for record in records] == [1, 3]
    assert num_bad == 1
    assert read_jsonl(tmp_path / "missing.jsonl") == ([], 0)


def test_truncate_drops_later_steps_and_torn_lines_from_both_files(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, {}, DISABLED)
    for step in (1, 2, 3):
        tracker.log({"x": step}, step=step)
        tracker.log_rollouts([{"step": step, "uid": step}, {"step": step, "uid": 10 + step}])
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 1, "ui')
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]
    assert tracker.truncate_after(2) == 1 + 2 + 1
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == kept
    records, num_bad = read_jsonl(tmp_path / "rollouts.jsonl")
    assert ([record["uid"] for record in records], num_bad) == ([1, 11, 2, 12], 0)
    tracker.log({"x": 9}, step=3)
    assert [record["x"] for record in read_jsonl(tmp_path / "metrics.jsonl")[0]] == [1, 2, 9]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_truncate_without_files_is_nothing(tmp_path: Path) -> None:
    assert Tracker(tmp_path, {}, DISABLED).truncate_after(5) == 0


def test_an_unwritable_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(SlipstreamError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        Tracker(tmp_path, {}, DISABLED).log({"x": 1}, step=1)


OFFLINE_JOB = """
import sys
from pathlib import Path
from slipstream.conf.schema import TrackingConfig
from slipstream.trainer.tracking import Tracker
run_dir, run_id, break_it = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3] == "break"
tracker = Tracker(run_dir, {"algo": {"num_steps": 3}}, TrackingConfig(), run_id)
tracker.log({"critic/rewards/mean": 0.5}, step=1)
if break_it:
    import wandb
    wandb.finish()
tracker.log({"critic/rewards/mean": 0.6}, step=2)
tracker.log({"critic/rewards/mean": 0.7}, step=3)
tracker.finish(0)
tracker.finish(0)
(run_dir / "id").write_text(tracker.wandb_run_id)
"""


def offline_job(home: Path, run_dir: Path, run_id: str = "", mode: str = "") -> subprocess.CompletedProcess[str]:
    """Runs OFFLINE_JOB in a process of its own: wandb keeps global state."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", OFFLINE_JOB, str(run_dir), run_id, mode],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_offline_wandb_is_quiet_local_and_continues_the_run(tmp_path: Path) -> None:
    home, run_dir = tmp_path / "home", tmp_path / "run"
    result = offline_job(home, run_dir)
    assert result.stdout + result.stderr == ""
    assert not list(home.rglob("*")), "wandb wrote outside the run folder"
    run_id = (run_dir / "id").read_text()
    (stored,) = run_dir.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    content = stored.read_bytes()
    assert b"critic/rewards/mean" in content
    assert b"training/global_step" in content

    offline_job(home, run_dir, run_id)
    assert (run_dir / "id").read_text() == run_id
    assert len(read_jsonl(run_dir / "metrics.jsonl")[0]) == 6


def test_wandb_failing_later_warns_once_and_is_counted(tmp_path: Path) -> None:
    result = offline_job(tmp_path / "home", tmp_path / "run", mode="break")
    assert result.stderr.count("Weights & Biases failed") == 1
    assert len(result.stderr.strip().splitlines()) == 1
    records, _ = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [record["tracking/num_wandb_errors"] for record in records] == [0, 1, 2]


def test_online_without_a_key_is_one_line_that_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(SlipstreamError) as caught:
        Tracker(tmp_path, {}, TrackingConfig(mode="online"))
    message = str(caught.value)
    assert "no API key" in message
    assert "tracking.mode=disabled" in message
    assert "\n" not in message


def test_disabled_never_imports_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slipstream.conf.schema import TrackingConfig; "
        "from slipstream.trainer.tracking import Tracker; "
        f"t = Tracker(Path({str(tmp_path)!r}), {{}}, TrackingConfig(mode='disabled')); "
        "t.log({}, 1); t.finish(0); sys.exit('wandb' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Checkpoints: whole or not at all, under kill -9, full disks and bit rot; optimizer state without pickle."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.trainer.checkpoint import (
    Best,
    copy_tensors,
    flatten_optimizer,
    latest,
    load_tensors,
    restore_optimizer,
    save,
    save_tensors,
    verify,
)
from slipstream.trainer.errors import CheckpointError


def writer(text: str) -> Callable[[Path], None]:
    """A `write` that makes two files, one in a subfolder."""

    def write(folder: Path) -> None:
        (folder / "state.json").write_text(text)
        (folder / "policy").mkdir()
        (folder / "policy" / "weights.bin").write_bytes(text.encode() * 100)

    return write


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_save_then_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    path = save(tmp_path, 10, writer("ten"), keep_last=2)
    assert path == tmp_path / "checkpoints" / "step_000010" == latest(tmp_path)
    assert verify(path) == 10
    assert (path / "state.json").read_text() == "ten"
    marker = json.loads((path / "COMPLETE").read_text())
    assert set(marker["files"]) == {"state.json", "policy/weights.bin"}
    assert marker["files"]["state.json"]["size"] == 3


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, writer(str(step)), keep_last=2)
    assert names(tmp_path) == ["step_000003", "step_000004"]


def test_pruning_never_trades_a_good_checkpoint_for_a_damaged_later_one(tmp_path: Path) -> None:
    save(tmp_path, 10, writer("ten"), keep_last=1)
    save(tmp_path, 20, writer("twenty"), keep_last=2)
    (tmp_path / "checkpoints/step_000020/state.json").write_text("rotten")
    save(tmp_path, 15, writer("fifteen"), keep_last=1)
    assert latest(tmp_path) == tmp_path / "checkpoints/step_000015"


def save_judged(run_dir: Path, step: int, value: float | None, **best: Any) -> None:
    judged = Best(**({"metric": "reward", "mode": "max", "count": 2} | best), value=value)
    save(run_dir, step, writer(str(step)), keep_last=1, best=judged)


def named_best(run_dir: Path) -> list[tuple[str, float]]:
    content = json.loads((run_dir / "checkpoints" / "best.json").read_text())
    return [(entry["folder"], entry["value"]) for entry in content["best"]]


def test_the_best_are_never_pruned_while_they_are_the_best(tmp_path: Path) -> None:
    for step, value in enumerate([0.1, 0.9, None, 0.5, float("nan"), 0.2, 0.5], start=1):
        save_judged(tmp_path, step, value)
    assert names(tmp_path) == ["best.json", "step_000002", "step_000007"], "of equals the newer one stays"
    assert named_best(tmp_path) == [("step_000002", 0.9), ("step_000007", 0.5)]
    assert json.loads((tmp_path / "checkpoints/step_000002/COMPLETE").read_text())["metric"]["value"] == 0.9
    save_judged(tmp_path, 8, 0.95)
    save_judged(tmp_path, 9, 0.97)
    assert names(tmp_path) == ["best.json", "step_000008", "step_000009"]
    save_judged(tmp_path, 10, None, mode="min", count=1)
    assert named_best(tmp_path) == [("step_000008", 0.95)]
    save_judged(tmp_path, 11, 7.0, metric="accuracy", count=1)
    assert named_best(tmp_path) == [("step_000011", 7.0)], "another metric says nothing about this one"
    save(tmp_path, 12, writer("12"), keep_last=1)
    assert names(tmp_path) == ["step_000012"]


def test_a_damaged_marker_is_no_candidate(tmp_path: Path) -> None:
    save_judged(tmp_path, 1, 5.0)
    (tmp_path / "checkpoints/step_000001/COMPLETE").write_text("{")
    save_judged(tmp_path, 2, 1.0)
    assert named_best(tmp_path) == [("step_000002", 1.0)]


def test_a_copy_is_in_memory_of_its_own_and_ties_stay_ties() -> None:
    base = torch.arange(4.0).reshape(2, 2)
    copy = copy_tensors({"a": base, "tied": base, "turned": base.T, "empty": torch.zeros(0, 2)})
    base.add_(1.0)
    assert torch.equal(copy["a"], torch.arange(4.0).reshape(2, 2))
    assert copy["a"] is copy["tied"]
    assert torch.equal(copy["turned"], copy["a"].T)
    assert copy["empty"].shape == (0, 2)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5, writer("old"), keep_last=1)
    path = save(tmp_path, 5, writer("new"), keep_last=1)
    assert (path / "state.json").read_text() == "new"
    assert names(tmp_path) == ["step_000005"]


def test_a_replaced_checkpoint_counts_until_its_successor_is_in_place(tmp_path: Path) -> None:
    path = save(tmp_path, 5, writer("old"), keep_last=1)
    replaced = path.rename(path.with_name("step_000005.replaced"))
    assert latest(tmp_path) == replaced
    save(tmp_path, 5, writer("new"), keep_last=1)
    assert names(tmp_path) == ["step_000005"]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: (path / "COMPLETE").unlink(), "incomplete"),
        (lambda path: (path / "COMPLETE").write_text('{"step"'), "COMPLETE cannot be read"),
        (lambda path: (path / "state.json").unlink(), "state.json: No such file"),
        (lambda path: (path / "state.json").write_text("tw"), "state.json has 2 bytes instead of 3"),
        (lambda path: (path / "state.json").write_text("twO"), "checksum of state.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], fault: str
) -> None:
    good = save(tmp_path, 1, writer("one"), keep_last=2)
    bad = save(tmp_path, 2, writer("two"), keep_last=2)
    damage(bad)
    with pytest.raises(CheckpointError, match=fault):
        verify(bad)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == good
    (record,) = caplog.records
    assert str(bad) in record.getMessage()


def test_a_failing_write_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 1, writer("one"), keep_last=1)

    def broken(folder: Path) -> None:
        writer("two")(folder)
        raise RuntimeError("model is gone")

    with pytest.raises(RuntimeError, match="model is gone"):
        save(tmp_path, 2, broken, keep_last=1)
    assert names(tmp_path) == ["step_000001"]
    with pytest.raises(ValueError, match="keep_last is 0"):
        save(tmp_path, 2, writer("two"), keep_last=0)
    with pytest.raises(ValueError, match="COMPLETE"):
        save(tmp_path, 2, lambda folder: (folder / "COMPLETE").touch(), keep_last=1)


def test_an_unusable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match=r"step_000001 cannot be written: File exists; \d+ bytes free"):
        save(tmp_path, 1, writer("one"), keep_last=1)


LIMITED_JOB = """
import resource, sys
from pathlib import Path
import torch
from slipstream.trainer.checkpoint import save, save_tensors
from slipstream.trainer.errors import CheckpointError
run_dir, mode = Path(sys.argv[1]), sys.argv[2]
save(run_dir, 1, lambda folder: (folder / "a.bin").write_bytes(b"x" * 3000), keep_last=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {"bytes": lambda folder: (folder / "a.bin").write_bytes(b"x" * 300_000),
       "tensors": lambda folder: save_tensors(folder / "a.safetensors", {"w": torch.ones(100_000)})}[mode]
try:
    save(run_dir, 2, big, keep_last=1)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("mode", ["bytes", "tensors"])
def test_a_write_the_system_refuses_is_one_line_and_keeps_the_previous(tmp_path: Path, mode: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED_JOB, str(tmp_path), mode],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (line,) = result.stdout.splitlines()
    assert "step_000002 cannot be written" in line
    assert "File too large" in line
    assert "bytes needed (size of step_000001)" in line
    assert "last complete: step_000001" in line
    assert latest(tmp_path) == tmp_path / "checkpoints/step_000001"
    assert names(tmp_path) == ["step_000001"]


KILL_JOB = """
import os, random, signal, sys, time
from pathlib import Path
from slipstream.trainer.checkpoint import latest, save, verify
run_dir = Path(sys.argv[1])

def write_for_ever(step):
    while True:
        step += 1
        def write(folder):
            for part in range(6):
                (folder / f"part_{part}.bin").write_bytes(str(step).encode() * 50_000)
        save(run_dir, step, write, keep_last=1)
        save(run_dir, step, write, keep_last=1)

save(run_dir, 0, lambda folder: None, keep_last=1)
rng = random.Random(0)
for _ in range(20):
    found = latest(run_dir)
    step = verify(found)
    print(step, flush=True)
    child = os.fork()
    if child == 0:
        write_for_ever(step)
    time.sleep(rng.uniform(0.02, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", KILL_JOB, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "passed over" not in result.stderr, "a kill left a folder that looks like a checkpoint and is none"
    steps = [int(line) for line in result.stdout.split()]
    assert len(steps) == 20
    assert steps == sorted(steps)
    assert steps[-1] > 0
    found = latest(tmp_path)
    assert found is not None
    step = verify(found)
    save(tmp_path, step + 1, writer("after"), keep_last=1)
    assert names(tmp_path) == [f"step_{step + 1:06d}"], "leftovers of the killed writers"


def model_and_optimizer(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> tuple:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(dtype)
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.01}]
    return model, make(groups)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(5, 4, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [torch.optim.AdamW, lambda groups: torch.optim.SGD(groups, momentum=0.9), torch.optim.SGD],
    ids=["adamw", "momentum", "sgd"],
)
def test_training_goes_on_exactly_after_a_round_trip(tmp_path: Path, make: Callable) -> None:
    model, optimizer = model_and_optimizer(make, torch.float32)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.05
    save_tensors(tmp_path / "optimizer.safetensors", flatten_optimizer(optimizer))
    other_model, other = model_and_optimizer(make, torch.float32)
    other_model.load_state_dict(model.state_dict())
    restore_optimizer(other, load_tensors(tmp_path / "optimizer.safetensors"))
    train(model, optimizer, 4)
    train(other_model, other, 4)
    for ours, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_moments_keep_their_own_precision() -> None:
    model, optimizer = model_and_optimizer(torch.optim.AdamW, torch.bfloat16)
    train(model, optimizer, 1)
    tensors = {
        key: value.float() + 1e-4 if key.endswith("exp_avg") else value
        for key, value in flatten_optimizer(optimizer).items()
    }
    restore_optimizer(optimizer, tensors)
    first = next(model.parameters())
    assert torch.equal(optimizer.state[first]["exp_avg"], tensors["state.0.exp_avg"])


def test_state_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    _, optimizer = model_and_optimizer(torch.optim.AdamW, torch.float32)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(CheckpointError, match="for 4 parameters; this optimizer has 1"):
        restore_optimizer(other, flatten_optimizer(optimizer))
    tensors = {"num_params": torch.tensor(1), "lr.0": torch.tensor(0.1), "state.0.exp_avg": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"state\.0\.exp_avg has shape \(3,\); its parameter has \(2,\)"):
        restore_optimizer(other, tensors)
    with pytest.raises(CheckpointError, match="0 parameter groups"):
        restore_optimizer(other, {"num_params": torch.tensor(1)})
    assert not other.state


def test_tensors_that_share_memory_and_damaged_files(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "tensors.safetensors"
    save_tensors(path, {"a": base, "tied": base, "turned": base.T})
    loaded = load_tensors(path)
    assert torch.equal(loaded["tied"], base)
    assert torch.equal(loaded["turned"], base.T)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors cannot be read"):
        load_tensors(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors(tmp_path / "missing.safetensors")

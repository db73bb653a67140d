"""The replay bench at a small size: generated traces, a job's rollouts, and predictions beside real runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.experiments.arms import ARMS
from slipstream.experiments.drafter_index.record import training_prompts
from slipstream.experiments.replay import run as bench
from slipstream.rollout.replay import CPU_QUICKSTART, H100_7B
from slipstream.trainer.config import load_settings
from slipstream.trainer.errors import ConfigError

FIGURES = {"makespan_s", "of_off", "rounds", "drafted", "accepted", "cpu_s"}


def run(*options: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    threads = torch.get_num_threads()
    try:
        return bench.run(parser.parse_args(list(options)))
    finally:
        torch.set_num_threads(threads)


def test_generated_traces_on_few_and_many_workers() -> None:
    result = run("--workers", "1", "100", "--seeds", "0")
    assert result.keys() == {"workers_1", "workers_100"}
    for count, policies in ((1, set(ARMS)), (100, {name for name in ARMS if not name.startswith("closed_form")})):
        one = result[f"workers_{count}"]
        assert one["arms"].keys() == policies
        assert all(arm.keys() == FIGURES for arm in one["arms"].values())
        assert one["arms"]["off"]["drafted"] == 0 < one["arms"]["price"]["accepted"]
        assert 1.0 <= one["price_vs_best"] < 1.02
        assert one["assumed"]["num_workers"] == count
        assert one["assumed"]["num_requests"] == 32 * count
        assert one["assumed"]["cost_base_ms"] == 1e3 * H100_7B.base
    # More workers hold more of the tail's longest.
    longest = [result[f"workers_{count}"]["arms"]["off"]["makespan_s"] for count in (1, 100)]
    assert longest[1] > longest[0]


def write_run(folder: Path, prompts: int, steps: int) -> list[dict[str, Any]]:
    """A run folder as a job leaves it: every step visits the same prompts, whose responses resemble each other."""
    settings = load_settings(["experiment=quickstart_short", "data.task.num_train=4", "data.task.num_validation=1"])
    saved = settings.model_dump(mode="json")
    (folder / "settings.json").write_text(json.dumps(saved), encoding="utf-8")
    rng = np.random.default_rng(1)
    names = [prompt.prompt_id for prompt in training_prompts(saved)[:prompts]]
    texts = {name: rng.integers(3, 30, 60).tolist() for name in names}
    rows = [
        {"step": step, "uid": 1000 * step + 10 * i + sample, "prompt_id": name, "finish": "stop"}
        | {"tokens": texts[name][: int(rng.integers(30, 60))]}
        for step in range(1, steps + 1)
        for i, name in enumerate(names)
        for sample in range(3)
    ]
    write_rows(folder, rows)
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_finished_job_is_replayed_for_every_policy(tmp_path: Path) -> None:
    rows = write_run(tmp_path, prompts=2, steps=3)
    result = run("--run", str(tmp_path))
    assert result["num_steps"] == 3
    assert result["arms"].keys() == set(ARMS)
    assert all(arm.keys() == FIGURES for arm in result["arms"].values())
    off, price = result["arms"]["off"], result["arms"]["price"]
    longest = [max(len(row["tokens"]) for row in rows if row["step"] == step) for step in (1, 2, 3)]
    # A pass for the prompts and one for every token of the longest response.
    assert off["rounds"] == sum(longest) + 3
    assert off["of_off"] == 1.0
    assert (off["drafted"], off["accepted"]) == (0, 0)
    assert 0 < price["accepted"] <= price["drafted"]
    assert price["of_off"] == price["makespan_s"] / off["makespan_s"] < 0.8
    assert result["price_vs_best"] >= 1.0
    assert result["assumed"]["cost_base_ms"] == 1e3 * CPU_QUICKSTART.base
    dear = run("--run", str(tmp_path), "--cost", "h100_7b")
    assert dear["arms"]["off"]["makespan_s"] > off["makespan_s"]


def test_a_run_that_cannot_be_replayed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allowed: the folder of a finished run"):
        run("--run", str(tmp_path))
    rows = write_run(tmp_path, prompts=1, steps=1)
    write_rows(tmp_path, [row | {"finish": "error"} for row in rows])
    with pytest.raises(ConfigError, match="no finished rollout"):
        run("--run", str(tmp_path))
    write_rows(tmp_path, [row | {"prompt_id": "unknown"} for row in rows])
    with pytest.raises(ConfigError, match="prompt unknown"):
        run("--run", str(tmp_path))
    write_run(tmp_path, prompts=1, steps=1)
    with (tmp_path / "rollouts.jsonl").open("a") as torn:
        torn.write('{"step": 2, "uid"')
    with pytest.raises(ConfigError, match="finished run"):
        run("--run", str(tmp_path))


def test_predictions_stand_beside_measurements() -> None:
    sizes = ["--seeds", "2", "--rounds", "1", "--batches", "1", "--max-new-tokens", "64"]
    validation = run("--workers", "1", *sizes)["validation"]
    arms = {"off", "fixed_4", "price"}
    for key in ("predicted_s", "measured_s", "relative_error"):
        assert validation[key].keys() == arms
    for name in arms:
        predicted, measured = validation["predicted_s"][name], validation["measured_s"][name]
        assert validation["relative_error"][name] == predicted / measured - 1.0
        # Two tiny epochs on a machine that does other things as well: the same order of magnitude.
        assert 0.3 < predicted / measured < 3.0
    assert validation["worst_relative_error"] == max(map(abs, validation["relative_error"].values()))
    assert validation["fitted_on_steps"] > 48
    assert all(value >= 0 for value in validation["fitted"].values())

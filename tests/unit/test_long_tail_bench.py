"""The long tail bench at a small size: all arms, the issue's keys, a picture per arm; and the pictures' own numbers."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.experiments import bench as command
from slipstream.experiments.arms import ARMS
from slipstream.experiments.long_tail import run as bench
from slipstream.experiments.long_tail.scale import PAPER_TRACE, closed_form_gap, paper_setting
from slipstream.rollout.replay import synthetic_trace
from slipstream.trainer.timeline_plots import Line, live_counts

TOY = ["--seeds", "1", "--rounds", "1", "--visits", "1", "--batches", "2", "--max-new-tokens", "32", "--workers", "1"]
POLICIES = {"off", "fixed_4", "fixed_16", "unlimited", "class", "closed_form_published", "closed_form", "price"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command as a user types it, all settings, with a file to write."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    threads = torch.get_num_threads()
    try:
        assert command.main(["long_tail", "--json", str(path), *TOY]) == 0
    finally:
        torch.set_num_threads(threads)
    return path


@pytest.fixture(scope="module")
def result(written: Path) -> dict[str, Any]:
    return json.loads(written.read_text())["result"]


def test_every_arm_runs_in_every_setting(result: dict[str, Any]) -> None:
    assert set(ARMS) == POLICIES
    epochs = {f"{setting.name}_{kind}" for setting in bench.SETTINGS for kind in ("cold", "warm")}
    for key in ("makespan_s", "of_off", "engine"):
        assert result[key].keys() == epochs
        assert all(by_arm.keys() == POLICIES for by_arm in result[key].values())
    for epoch in epochs:
        assert all(seconds > 0 for seconds in result["makespan_s"][epoch].values())
        assert result["of_off"][epoch]["off"] == 1.0
        engine = result["engine"][epoch]
        assert engine["off"]["drafted"] == 0
        assert engine["unlimited"]["drafted"] > engine["fixed_4"]["drafted"] > 0
    # Earlier visits are what a warm epoch has more than a cold one.
    warm, cold = (result["engine"][f"quickstart_{kind}"]["fixed_4"] for kind in ("warm", "cold"))
    assert warm["accepted"] > cold["accepted"]


def test_the_figures_follow_from_the_makespans(result: dict[str, Any]) -> None:
    assert result["tokens_different"] == 0
    assert result["tokens_compared"] >= 2 * 7 * (2 * 16 + 2 * 64) * 10
    ratios = result["of_off"]
    assert result["price_vs_best"].keys() == ratios.keys()
    assert result["worst_price_vs_best"] == max(result["price_vs_best"].values()) >= 1.0
    assert result["worst_regret_vs_off"] == max(by_arm["price"] for by_arm in ratios.values()) - 1.0
    assert result["warm_reduction"] == {
        key: 1.0 - by_arm["price"] for key, by_arm in ratios.items() if key.endswith("_warm")
    }
    # One seed and one round: the ratio is that of the seconds shown.
    for key, by_arm in result["makespan_s"].items():
        assert ratios[key]["price"] == pytest.approx(by_arm["price"] / by_arm["off"])


def test_replays_and_limits_are_reported(result: dict[str, Any]) -> None:
    assert abs(result["closed_form_gap"]) <= 0.005 < result["closed_form_gap_published"]
    assert 0 < result["solve_ms_4096"] < 1000
    assert len(result["replay_price_vs_best"]) == 6
    assert all(1.0 <= value < 1.05 for value in result["replay_price_vs_best"].values())


def test_the_papers_setting_says_what_it_assumes(result: dict[str, Any]) -> None:
    paper = result["paper_setting"]
    assert paper["paper_reduction"] == [0.40, 0.48]
    assert paper["warm"].keys() == paper["cold"].keys() == POLICIES
    assert paper["warm"]["off"] == 0.0 < paper["warm"]["price"] < 1.0
    assert {"requests", "lengths", "acceptance", "cost", "temperature"} <= paper["assumed"].keys()
    assumed = paper["warm_assumed"]
    assert (assumed["num_requests"], assumed["max_live"], assumed["cap_tokens"]) == (256, 256, 16384)
    assert (assumed["cost_base_ms"], assumed["cost_tok_us"]) == (7.5, 26.0)


def test_the_words_about_the_papers_trace_are_true() -> None:
    """Some responses reach the cap, of prompts of any mean; a fixed draft of eight has 1.6 tokens accepted."""
    paper = paper_setting(3)
    assert 0.01 < paper["warm_assumed"]["share_at_cap"] < 0.1
    kinds, share = np.array(PAPER_TRACE["accept"]) * 0.95, np.array(PAPER_TRACE["share"])
    assert (kinds * (1 - kinds**8) / (1 - kinds)) @ share == pytest.approx(1.6, abs=0.05)
    trace = synthetic_trace(16, 16, visits=90, **PAPER_TRACE)
    means = np.array([past.mean() for past in trace.history])
    reached = np.array([past.max() == trace.cap_tokens for past in trace.history])
    assert reached[means < np.median(means)].mean() > 0.5
    assert reached[means > np.median(means)].all()
    # Steps are shorter than the paper's: the words say that only shares can be compared.
    assert paper["warm_off_makespan_s"] < paper["paper_step_s"][0]


def test_the_brute_force_search_is_fine_enough_for_its_bar() -> None:
    coarse, fine = (closed_form_gap(1, points)["corrected"] for points in (2000, 20000))
    assert abs(fine) < 1e-4
    assert coarse <= fine + 1e-9


def test_a_picture_of_every_arm_lies_beside_the_result(written: Path, result: dict[str, Any]) -> None:
    assert result["pictures"] == "pictures/ beside this file"
    pictures = {path.stem: path.read_bytes() for path in (written.parent / "pictures").glob("*.png")}
    assert pictures.keys() == POLICIES
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert len(set(pictures.values())) == len(POLICIES)


def test_pictures_go_where_they_are_asked_for(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.picture_folder(parser.parse_args([])) is None
    assert bench.picture_folder(parser.parse_args(["--pictures", str(tmp_path)])) == tmp_path


def test_batches_that_follow_each_other_are_not_live_together() -> None:
    first, second = Line([1.0, 2.0, 3.0], [0, 0, 1]), Line([1.0, 2.0], [0, 0])
    later = Line([4.0, 5.0], [0, 0])
    times, counts = live_counts([first, later, second])
    assert dict(zip(times.tolist(), counts.tolist(), strict=True)) == {0.0: 2, 2.0: 1, 3.0: 1, 5.0: 0}
    times, counts = live_counts([Line([7.0], [0], starts_at_zero=True)])
    assert (times.tolist(), counts.tolist()) == ([0.0, 7.0], [1, 0])
    assert live_counts([])[1].tolist() == [0]


def test_the_collector_is_as_before_afterwards(result: dict[str, Any]) -> None:
    assert result
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0

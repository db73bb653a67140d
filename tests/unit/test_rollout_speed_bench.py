"""The rollout speed bench at a small size: matched lengths, all keys, peers that do the work they are timed for."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from slipstream.experiments.rollout_speed import run as bench
from slipstream.experiments.rollout_speed.peers import RowLengths, batched_generate, first_layers, one_by_one
from slipstream.experiments.workload import Workload, quickstart_workload


@pytest.fixture(scope="module")
def workload() -> Workload:
    return quickstart_workload()


@pytest.fixture(scope="module")
def model(workload: Workload) -> PreTrainedModel:
    return workload.model().eval()


def test_rows_end_at_their_own_length() -> None:
    stop = RowLengths(3, [2, 5])
    done = [stop(torch.zeros(2, 3 + n), None).tolist() for n in range(6)]
    assert done == [[n >= 2, n >= 5] for n in range(6)]


def test_peers_make_as_many_tokens_as_asked(workload: Workload, model: PreTrainedModel) -> None:
    requests = workload.requests(workload.prompts.train[:2], 1, 8)
    pad = workload.tokenizer.pad_token_id or 0
    steps: list[int] = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    try:
        assert batched_generate(model, requests, [3, 9], pad) > 0
        assert len(steps) == 9
        steps.clear()
        started = time.perf_counter()
        assert one_by_one(model, requests, [3, 4], pad) < time.perf_counter() - started
        assert len(steps) == 7
    finally:
        hook.remove()


def test_the_assistant_is_a_part_of_the_policy(workload: Workload, model: PreTrainedModel) -> None:
    assistant = first_layers(model, workload.model, 1)
    layers: Any = assistant.get_decoder()
    whole: Any = model.get_decoder()
    assert len(layers.layers) == 1 < len(whole.layers)
    ids = torch.arange(10, 14)[None]
    assert assistant(ids).logits.shape == model(ids).logits.shape


def test_the_bench_compares_tokens_and_speeds() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    options = ["--prompts", "2", "--samples", "2", "--max-new-tokens", "24", "--visits", "1", "--rounds", "1"]
    threads = torch.get_num_threads()
    try:
        result = bench.run(parser.parse_args([*options, "--threads", "1", "--one-by-one", "1", "--no-memory"]))
    finally:
        torch.set_num_threads(threads)
    assert result["num_requests"] == 4
    assert result["tokens_compared"] == 2 * result["num_tokens"]
    assert result["tokens_different"] == 0
    arms = {"off", "cold", "warm", "hf_generate", "hf_one_by_one", "hf_prompt_lookup", "hf_assisted"}
    tiles = {"off_fma", "warm_fma"} if result["cpu_products"] == "tiles" else set()
    assert result["tokens_per_s"].keys() == arms | tiles
    assert result["speedup_vs_fma"].keys() == {arm.removesuffix("_fma") for arm in tiles}
    assert all(rate > 0 for rate in result["tokens_per_s"].values())
    assert result["accepted_per_round"]["off"] == 0 < result["accepted_per_round"]["warm"]
    assert result["engine_steps"]["warm"] < result["engine_steps"]["off"]
    assert np.isclose(sum(result["engine_share"]["off"].values()), 1.0)

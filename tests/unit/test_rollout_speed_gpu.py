"""The GPU arm of the rollout speed bench: its bytes and comparisons, run at a toy size on the device at hand."""

from __future__ import annotations

import argparse
import math

import pytest
import torch

from tests.triton_interpreter import DEVICE  # isort: skip

from slipstream.experiments.kernels import timing
from slipstream.experiments.rollout_speed import gpu
from slipstream.experiments.rollout_speed import run as bench
from slipstream.experiments.rollout_speed.memory import cpu_memory, figures
from slipstream.experiments.rollout_speed.presets import PRESETS, bytes_read, make_model
from slipstream.experiments.workload import quickstart_workload
from slipstream.trainer.errors import ConfigError

SMALL = "--preset tiny --tail 2 --samples 2 --visits 1 --rounds 1 --max-new-tokens 24"
OPTIONS = [*SMALL.split(), "--prompt-tokens", "20", "--context", "40", "--decode-steps", "8"]


def parse(options: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(options)


def test_the_gpu_arm_at_a_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COPY_BYTES", 2**26)
    result = gpu.run_gpu(parse(OPTIONS), torch.device(DEVICE), torch.float32)
    weights = sum(tensor.numel() for tensor in make_model("tiny", torch.float32, torch.device("cpu")).parameters())
    assert result["parameters"] == weights
    for batch in (1, 8):
        decode = result["decode"][f"batch_{batch}"]
        kv = 2 * 2 * 2 * 16 * 4
        assert decode["bytes"] == pytest.approx(4 * weights + batch * decode["context_tokens"] * kv, rel=0.3)
        assert 36 <= decode["context_tokens"] <= 44
        assert math.isclose(decode["floor_share"], decode["floor_ms"] / decode["step_ms"])
    assert result["tokens_per_s"].keys() == {"off", "warm", "off_invariant", "warm_invariant", "hf_generate"}
    assert result["tokens_compared"] == result["tokens_compared_invariant"] == 2 * 2 * 24
    assert result["tokens_different_invariant"] == 0
    # A GPU's library products follow the batch: ties of floating point may fall otherwise.
    assert result["tokens_different"] == 0 or DEVICE == "cuda"
    assert result["accepted_per_round"] > 0
    assert 0 < result["accepted_share_of_drafted"] <= 1


def test_presets_are_as_large_as_asked() -> None:
    models = {name: make_model(name, torch.bfloat16, torch.device("meta")) for name in PRESETS}
    counts = {name: sum(tensor.numel() for tensor in model.parameters()) for name, model in models.items()}
    assert 0.5e9 < counts["qwen3_0.6b"] < 0.8e9 < counts["llama_1b"] < 1.5e9 < 7.9e9 < counts["llama_8b"] < 8.1e9
    looked_up = {"llama_8b": 128_256 * 4096}
    assert all(bytes_read(model) == 2 * (counts[name] - looked_up.get(name, 0)) for name, model in models.items())


def test_an_embedding_that_is_only_looked_up_in_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, shape = PRESETS["tiny"]
    monkeypatch.setitem(PRESETS, "tiny", (kind, shape | {"tie_word_embeddings": False}))
    model = make_model("tiny", torch.float32, torch.device("cpu"))
    assert bytes_read(model) == sum(t.nbytes for t in model.parameters()) - 300 * 64 * 4


def test_without_a_gpu_the_arm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda: torch sees no GPU"):
        bench.run(parse(["--device", "cuda"]))


def test_memory_is_a_slope_and_a_constant() -> None:
    readings = [{"peak": 1000 + 100 * 33, "kv_bytes": 100 * 30}, {"peak": 1000 + 500 * 33, "kv_bytes": 500 * 30}]
    found = figures(readings, [100, 500])
    assert found["peak_memory_per_live_token"] == 33
    assert found["kv_bytes_per_token"] == 30
    assert found["peak_memory_over_kv_bytes"] == pytest.approx(1.1)
    assert found["peak_memory_constant_mib"] * 2**20 == pytest.approx(1000)


@pytest.mark.slow
def test_a_live_token_costs_its_keys_and_values() -> None:
    """Within a tenth: what issue 4 asks for. Two processes, each with a model and a full engine."""
    found = cpu_memory(quickstart_workload().folder)
    assert found["kv_bytes_per_token"] == 2048
    assert 0.95 < found["peak_memory_over_kv_bytes"] < 1.1

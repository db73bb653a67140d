"""The kernels bench: small errors, honest gaps where there is no GPU, and a GPU part that runs at toy sizes."""

from __future__ import annotations

import argparse
import time

import pytest
import torch

from tests.triton_interpreter import DEVICE  # isort: skip

from slipstream.experiments.kernels import native, timing, triton_speed
from slipstream.experiments.kernels import run as bench
from slipstream.experiments.kernels.cases import TOY
from slipstream.experiments.kernels.triton_errors import triton_errors
from slipstream.kernels import _native  # type: ignore[attr-defined]

TINY = triton_speed.Sizes(
    vocab=300,
    sampled_rows=(2,),
    context=70,
    requests=2,
    widths=(1, 8),
    heads={"0.5b": TOY, "8b": TOY},
    hidden=64,
    inner=96,
    train_tokens=3,
    cached_bytes=1,
)


def test_the_bench_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VOCAB", 2000)
    monkeypatch.setattr(timing, "COPY_BYTES", 2**26)
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.001)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    result = bench.run(parser.parse_args(["--device", "cpu", "--rounds", "1"]))
    products = {"linear_float32", "linear_bfloat16", "linear_float32_tiles", "linear_bfloat16_tiles"}
    layers = products | {"rms_norm"}
    rest = {"sample_verify", "sample_verify_filtered", "ragged_attention", "append_kv"}
    assert result["native"].keys() == layers | rest
    assert result["amx"] == _native.Context(1).amx
    for name, one in result["native"].items():
        assert one["max_error"] < (0.01 if "bfloat16" in name else 1e-4), name
        assert one["us"] > 0
        assert one["bytes"] > 0
        assert one["floor_share"] > 0
    assert result["native"]["sample_verify"]["tokens_different"] == 0
    assert result["triton_speed"] == bench.NO_GPU
    assert set(result["bars"].values()) == {bench.NO_GPU}
    # Where a GPU is, Triton compiles: then nothing of it runs on the CPU.
    errors = result["triton_error"] if DEVICE == "cpu" else triton_errors(torch.device(DEVICE))
    assert errors["sample_verify"]["tokens_different"] == 0
    assert errors["append_kv"]["max_error"] == 0
    assert all(one["max_error"] < 0.02 for one in errors.values())


def test_the_gpu_part_runs_at_toy_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the interpreter its times mean nothing; names, bytes and bars are those of a GPU."""
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    speed = bench.with_shares(triton_speed.triton_speed(torch.device(DEVICE), 1, TINY), 1e9)
    assert len(speed) >= 20
    assert speed["sample_verify_bfloat16_2_rows"]["bytes"] == 2 * 300 * 2
    assert speed["verify_attention_8b_8_tokens"]["bytes"] == 2 * 70 * 2 * 2 * 32 * 2
    assert speed["append_kv"]["floor_share"] > 0
    found = bench.bars(speed)
    assert all(isinstance(value, float) for value in found.values())
    eight, one = (speed[f"verify_attention_8b_{width}_tokens"]["us"] for width in (8, 1))
    assert found["verify_attention_8_over_1_8b"] == eight / one
    assert set(bench.bars({}).values()) == {None}


def test_time_is_that_of_one_call() -> None:
    calls = [lambda: time.sleep(0.004), lambda: time.sleep(0.012)]
    assert 8_000 <= timing.microseconds(calls, torch.device("cpu"), 3) < 80_000

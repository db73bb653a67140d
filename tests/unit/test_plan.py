"""The plan's numbers are right, and its text says them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from slipstream.conf.schema import Settings
from slipstream.trainer.config import load_settings
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.model_shape import read_model_shape
from slipstream.trainer.plan import format_plan, make_plan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers, two KV heads of 16: 2 x 2 x 2 x 16 = 128 cached values per token; 1,000 + 24 parameters."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "max_position_embeddings": 1024,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {"a": [10, 100], "b": [24]}
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def settings_of(model: Path, *overrides: str) -> Settings:
    return load_settings([f"model.path={model}", *overrides])


def test_the_arithmetic_of_a_job(model: Path) -> None:
    plan = make_plan(settings_of(model, "algo.num_steps=10", "algo.num_updates_per_step=4"))
    assert plan.batch.samples_per_step == 16 * 8
    assert plan.batch.samples_per_update == 32
    assert plan.batch.epochs == pytest.approx(10 * 16 / 64)
    text = format_plan(plan)
    for line in (
        "16 prompts x 8 samples = 128 samples",
        "4 of 32 samples each",
        "10 steps = 160 prompts = 1,280 samples",
        "2.50 over 64 training prompts",
    ):
        assert line in text


def test_the_memory_of_a_model_on_this_machine(model: Path) -> None:
    plan = make_plan(settings_of(model, "engine.max_live_requests=10", "algo.kl_coef=0.1"))
    assert plan.memory is not None
    assert plan.memory.num_parameters == 1024
    assert plan.memory.worker_weights == 4096
    assert plan.memory.worker_kv_cache == 10 * (512 + 512) * 128 * 4
    assert plan.memory.learner == 4096 * (1 + 1 + 2 + 1)
    assert "4 KiB weights, 5 MiB KV cache: 10 requests x 1,024 tokens" in format_plan(plan)
    half = make_plan(settings_of(model, "engine.max_live_requests=10", "model.dtype=bfloat16"))
    assert half.memory is not None
    assert half.memory.worker_kv_cache == plan.memory.worker_kv_cache // 2


def test_the_shipped_policy_is_measured_as_its_tensors_are() -> None:
    shape = read_model_shape(Path(__file__).resolve().parents[2] / "experiments/quickstart/policy")
    assert shape is not None
    from safetensors import safe_open

    policy = Path(__file__).resolve().parents[2] / "experiments/quickstart/policy/model.safetensors"
    with safe_open(policy, "np") as tensors:
        assert shape.num_parameters == sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    text = format_plan(make_plan(load_settings(["experiment=gsm8k_one_gpu", "data.train_path=org/name"])))
    assert "unknown: the model's files are not on this machine" in text
    assert "unknown before the data is loaded" in text
    assert "Instruct from the Hugging Face hub, bfloat16" in text
    (tmp_path / "config.json").write_text('{"n_layer": 12}', encoding="utf-8")
    assert make_plan(settings_of(tmp_path)).memory is None


def test_parquet_rows_are_counted(tmp_path: Path, model: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a"] * 48})
    for name in ("a", "b"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    folder = make_plan(settings_of(model, "data=parquet", f"data.train_path={tmp_path}"))
    assert folder.batch.num_train_prompts == 96
    one = make_plan(settings_of(model, "data=parquet", f"data.train_path={tmp_path / 'a.parquet'}"))
    assert one.batch.num_train_prompts == 48
    (tmp_path / "c.parquet").write_text("not parquet", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.train_path=.*c\.parquet: .*allowed: parquet files"):
        make_plan(settings_of(model, "data=parquet", f"data.train_path={tmp_path / 'c.parquet'}"))


def test_actors_speculation_and_places(model: Path) -> None:
    overrides = ["experiment=quickstart", "cluster.num_workers=3", "run.dir=/tmp/runs", "run.name=x"]
    text = format_plan(make_plan(settings_of(model, *overrides)))
    assert "3 x rollout worker" in text
    assert "1 x learner" in text
    assert "suffix, at most 32 tokens" in text
    assert "14 steps replayed with drafting off: 17, 30, 43" in text
    assert "/tmp/runs/x/checkpoints, every 32 steps and at the end, the last 2 kept" in text
    off = format_plan(make_plan(settings_of(model, "drafter=off", "budget=fixed")))
    assert "drafter  off" in off
    assert "no replays" in off


def test_more_than_the_machine_has_is_a_warning(model: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    local = make_plan(settings_of(model, f"cluster.num_workers={cores + 1}"))
    assert any(f"ask for {cores + 2} CPUs and this machine has {cores}" in text for text in local.warnings)
    assert "! the actors ask for" in format_plan(local)
    joined = make_plan(settings_of(model, f"cluster.num_workers={cores + 1}", "cluster=existing"))
    assert not any("CPUs" in text for text in joined.warnings)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algo=grpo_async", "proof.every_steps=1"], "cannot be replayed"),
        (["algo=dapo", "proof.every_steps=1"], "cannot be replayed"),
        (["drafter=off", "proof.every_steps=1"], "replays steps in which nothing is drafted"),
        (["budget=off"], "drafter learns, but nothing is drafted"),
        (["proof.every_steps=2", "proof.first_step=99"], "comes after the last step"),
        (["budget=fixed", "budget.num_draft_tokens=40"], "is above drafter.max_draft_tokens=32"),
        (["data.task.num_train=8"], "repeats some of the 8 prompts"),
        (["algo.num_steps=4"], "no prompt is seen twice"),
        (["sampling.max_new_tokens=600"], "= 1,112, and the model was made for 1,024 positions"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_work_against_each_other_are_warned_of(model: Path, overrides: list[str], words: str) -> None:
    assert any(words in text for text in make_plan(settings_of(model, *overrides)).warnings)


def test_the_plan_says_how_far_generation_runs_ahead(model: Path) -> None:
    synchronous = format_plan(make_plan(settings_of(model)))
    assert "sampling and learning take turns" in synchronous
    ahead = format_plan(make_plan(settings_of(model, "algo.max_staleness_steps=2", "algo.num_extra_groups=3")))
    assert "at most 2 updates, 51 groups started or in training (continue)" in ahead

"""Prompts and their order: stable names, counted faults, every prompt once per epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.conf.schema import DataConfig, TaskConfig
from slipstream.trainer.data.byte_tokenizer import write_byte_tokenizer
from slipstream.trainer.data.chain_sum import make_rows
from slipstream.trainer.data.parquet import write_rows
from slipstream.trainer.data.prompts import PromptOrder, load_prompts
from slipstream.trainer.data.tokenizer import ChatTokenizer, load_tokenizer
from slipstream.trainer.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


def row(content: Any = "What is 2+2?", **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": content}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
    }
    return {**base, **changes}


def parquet_config(rows: list[dict[str, Any]], folder: Path, **changes: Any) -> DataConfig:
    write_rows(rows, folder / "train.parquet")
    return DataConfig(source="parquet", train_path=str(folder / "train.parquet"), **changes)


def test_built_in_task(tokenizer: ChatTokenizer) -> None:
    prompts = load_prompts(DataConfig(task=TaskConfig(num_train=20, num_validation=10)), tokenizer, seed=7)
    assert (len(prompts.train), len(prompts.validation), prompts.left_out) == (20, 10, [])
    rows = make_rows(TaskConfig(num_train=20, num_validation=10), "train")
    first = prompts.train[0]
    assert first.tokens.dtype == np.int32
    assert tokenizer.decode(first.tokens, skip_special_tokens=False) == (
        f"<|user|>{rows[0]['prompt'][0]['content']}<|end|><|assistant|>"
    )
    assert (first.ground_truth, first.style) == (rows[0]["reward_model"]["ground_truth"], "exact")
    assert first.level == rows[0]["extra_info"]["level"] > 0
    assert prompts.order(4) == PromptOrder(20, 4, seed=7, shuffle=True)


def test_parquet_equals_the_task_it_was_made_from(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    task = TaskConfig(num_train=15, num_validation=6)
    write_rows(make_rows(task, "train"), tmp_path / "train.parquet")
    write_rows(make_rows(task, "validation"), tmp_path / "validation.parquet")
    data = DataConfig(
        source="parquet",
        train_path=str(tmp_path / "train.parquet"),
        validation_path=str(tmp_path / "validation.parquet"),
    )
    read, made = load_prompts(data, tokenizer, 0), load_prompts(DataConfig(task=task), tokenizer, 0)
    for one, other in zip([*read.train, *read.validation], [*made.train, *made.validation], strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert (one.prompt_id, one.extra_info, one.level) == (other.prompt_id, other.extra_info, other.level)


def test_prompt_id_is_stable_and_depends_on_source_and_messages(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("a", data_source="x/math"), row("a")]
    ids = [prompt.prompt_id for prompt in load_prompts(parquet_config(rows, tmp_path), tokenizer, 0).train]
    assert ids[0] == ids[3] == "openai/gsm8k/aa07fd0379bd763a"
    assert len(set(ids)) == 3


def test_prompt_key_and_missing_validation(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    renamed = [{"question": r["prompt"], **{k: v for k, v in r.items() if k != "prompt"}} for r in [row()]]
    prompts = load_prompts(parquet_config(renamed, tmp_path, prompt_key="question"), tokenizer, 0)
    assert len(prompts.train) == 1
    assert prompts.validation == []


def test_rows_left_out_are_counted_with_examples(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = [
        row(),
        *[row("x" * n) for n in (600, 700, 800, 900)],
        row("  \n "),
        row(prompt=[]),
        row(prompt=[{"role": "user", "content": None}]),
        row(prompt=[{"role": "oracle", "content": "hi"}]),
        row(reward_model={"style": "rule", "ground_truth": None}),
        row(data_source=None),
    ]
    prompts = load_prompts(parquet_config(rows, tmp_path, max_prompt_tokens=100), tokenizer, 0)
    assert len(prompts.train) == 1
    counts = {entry.reason: entry.count for entry in prompts.left_out}
    assert counts == {
        "prompt too long": 4,
        "empty prompt": 2,
        "malformed prompt": 1,
        "refused by the chat template": 1,
        "malformed reward_model": 1,
        "malformed data_source": 1,
    }
    longest = next(entry for entry in prompts.left_out if entry.reason == "prompt too long")
    assert len(longest.examples) == 3
    assert longest.line().startswith("train: 4 rows left out, prompt too long (e.g. row 1: 603 tokens")


def test_a_split_without_a_usable_row_is_one_line(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable row among the 2 .*prompt too long") as error:
        load_prompts(parquet_config([row("x" * 50), row("y" * 60)], tmp_path, max_prompt_tokens=9), tokenizer, 0)
    assert "\n" not in str(error.value)


def test_ground_truth_that_is_no_string_becomes_json(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    data = parquet_config([row(reward_model={"style": "rule", "ground_truth": 42})], tmp_path)
    assert load_prompts(data, tokenizer, 0).train[0].ground_truth == "42"


@given(
    num_prompts=st.integers(1, 30),
    num_per_step=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
    shuffle=st.booleans(),
)
def test_every_prompt_once_per_epoch(num_prompts: int, num_per_step: int, seed: int, shuffle: bool) -> None:
    order = PromptOrder(num_prompts, num_per_step, seed, shuffle)
    num_steps = -(-3 * num_prompts // num_per_step)
    visited = np.concatenate([order.indices(step) for step in range(1, num_steps + 1)])
    assert len(visited) == num_steps * num_per_step
    for epoch in range(3):
        part = visited[epoch * num_prompts : (epoch + 1) * num_prompts].tolist()
        assert Counter(part) == Counter(range(num_prompts))
        assert shuffle or part == sorted(part)
    assert order.epoch(1) == 0
    assert order.epoch(num_steps) == (num_steps - 1) * num_per_step // num_prompts


def test_order_is_a_function_of_seed_and_step() -> None:
    order = PromptOrder(64, 16, seed=1)
    later = order.indices(9).tolist()
    assert PromptOrder(64, 16, seed=1).indices(9).tolist() == later
    assert PromptOrder(64, 16, seed=2).indices(9).tolist() != later
    assert order.indices(1).tolist() != order.indices(5).tolist(), "each epoch has an order of its own"


def test_order_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="steps count from 1"):
        PromptOrder(4, 2, seed=0).indices(0)
    with pytest.raises(ValueError, match="at least 1"):
        PromptOrder(0, 2, seed=0)


def test_a_groups_prompt_is_its_steps() -> None:
    """Group g of the job is place g mod n of step g // n + 1, over epochs."""
    order = PromptOrder(7, 3, seed=5)
    expected = np.concatenate([order.indices(step) for step in range(1, 6)])
    assert [order.at(number) for number in range(15)] == expected.tolist()

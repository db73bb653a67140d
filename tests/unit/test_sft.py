"""Warm start: packing changes nothing, only answers are learned, the command writes a model that loads."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from slipstream.conf.schema import DataConfig, TaskConfig
from slipstream.trainer.data.byte_tokenizer import write_byte_tokenizer
from slipstream.trainer.data.chain_sum import make_rows
from slipstream.trainer.data.demonstrations import load_documents, stream_rows, stream_task, to_document
from slipstream.trainer.data.packing import IGNORE, Document, assign_rows, pack
from slipstream.trainer.data.parquet import write_rows
from slipstream.trainer.data.prompts import load_prompts
from slipstream.trainer.data.tokenizer import ChatTokenizer, load_tokenizer
from slipstream.trainer.errors import DataError
from slipstream.trainer.sft import (
    draw_documents,
    evaluate,
    learning_rate_share,
    longest_document,
    main,
    packed_logits,
    packed_loss,
    tiny_model,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def documents(tokenizer: ChatTokenizer) -> list[Document]:
    return draw_documents(stream_task(tokenizer, seed=3), num_tokens=500, longest=160)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_equals_separate_passes(tokenizer: ChatTokenizer, documents: list[Document], attention: str) -> None:
    model = tiny_model(tokenizer, seed=0).eval()
    model.set_attn_implementation(attention)
    rows = pack(documents, 170, pad_id=256)
    assert len(rows.tokens) < len(documents)
    with torch.no_grad():
        packed = packed_logits(model, rows)
        compared = 0
        for row, members in enumerate(assign_rows([len(d.tokens) for d in documents], 170)):
            for number, index in enumerate(members):
                alone = model(torch.from_numpy(documents[index].tokens).long()[None]).logits[0]
                here = packed[row][torch.from_numpy(rows.document_ids[row] == number)]
                torch.testing.assert_close(here, alone, rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared == len(documents)


def test_loss_is_the_mean_over_answer_tokens(tokenizer: ChatTokenizer, documents: list[Document]) -> None:
    model = tiny_model(tokenizer, seed=0).eval()
    losses = []
    with torch.no_grad():
        for document in documents:
            tokens = torch.from_numpy(document.tokens).long()
            answer = slice(document.prompt_len - 1, len(tokens) - 1)
            logits = model(tokens[None]).logits[0]
            losses.append(F.cross_entropy(logits[answer], tokens[document.prompt_len :], reduction="none"))
        packed = packed_loss(model, pack(documents, 170, pad_id=256))
    torch.testing.assert_close(packed, torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)


def test_document_is_what_the_policy_sees(tokenizer: ChatTokenizer) -> None:
    document = to_document(tokenizer, [{"role": "user", "content": "=7 a+5"}], "a+5=12\n#### 12")
    text = tokenizer.decode(document.tokens, skip_special_tokens=False)
    assert text == "<|user|>=7 a+5<|end|><|assistant|>a+5=12\n#### 12<|end|>"
    assert tokenizer.decode(document.tokens[: document.prompt_len], False).endswith("<|assistant|>")
    labels = pack([document], 40, pad_id=256).labels[0]
    assert tokenizer.decode(labels[labels != IGNORE], False) == "a+5=12\n#### 12<|end|>"


@given(lengths=st.lists(st.integers(2, 50), min_size=1, max_size=40))
def test_every_document_is_packed_once(lengths: list[int]) -> None:
    documents = [Document(np.full(n, i, np.int32), 1) for i, n in enumerate(lengths)]
    rows = pack(documents, 50, pad_id=99)
    assert rows.num_tokens == sum(lengths)
    for i, n in enumerate(lengths):
        assert int((rows.tokens == i).sum()) == n
    starts = (rows.position_ids == 0) & (rows.document_ids >= 0)
    assert int(starts.sum()) == len(lengths)
    assert rows.attention_mask().any(-1).all(), "an empty row of a softmax is NaN"


def test_document_that_fits_no_row() -> None:
    with pytest.raises(ValueError, match="document 0 has 9 tokens; a row holds 8"):
        pack([Document(np.zeros(9, np.int32), 1)], 8, pad_id=0)


def test_a_curriculum_shorter_than_every_document_takes_the_shortest(documents: list[Document]) -> None:
    drawn = draw_documents(stream_rows(documents, seed=0), num_tokens=500, longest=3)
    assert len(drawn) == 1
    assert len(drawn[0].tokens) == min(len(document.tokens) for document in documents)


def test_schedules() -> None:
    shares = [learning_rate_share(step, 100, 10) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == pytest.approx(1.0)
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == pytest.approx(0.1, abs=1e-3)
    longest = [longest_document(step, 100, 0.5, 576) for step in range(100)]
    assert longest == sorted(longest)
    assert longest[0] == 58
    assert set(longest[50:]) == {576}
    assert longest_document(0, 100, 0.0, 576) == 576


def test_rows_without_an_answer_are_counted(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = make_rows(TaskConfig(num_train=8, max_level=2), "train")
    rows[0]["extra_info"]["answer"] = None
    rows[1]["extra_info"]["answer"] = "1\n" * 200
    rows[2]["prompt"] = [{"role": "oracle", "content": "hi"}]
    rows[3]["prompt"] = []
    write_rows(rows, tmp_path / "t.parquet")
    documents, left_out = load_documents(str(tmp_path / "t.parquet"), "prompt", tokenizer, 200)
    assert len(documents) == 4
    assert left_out == {
        "no text in extra_info.answer": 1,
        "longer than --row-tokens 200": 1,
        "refused by the chat template": 1,
        "empty prompt": 1,
    }
    stream = stream_rows(documents, seed=0)
    epochs = [[id(next(stream)) for _ in range(4)] for _ in range(3)]
    assert all(set(epoch) == {id(document) for document in documents} for epoch in epochs)
    with pytest.raises(DataError, match="nothing to learn from"):
        load_documents(str(tmp_path / "t.parquet"), "prompt", tokenizer, 8)


def small_run(out: Path, *options: str) -> int:
    sizes = ["--num-rows", "2", "--row-tokens", "160", "--threads", "1", "--max-new-tokens", "12"]
    return main(["--out", str(out), *sizes, *options])


def test_command_learns_from_parquet_and_repeats_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(make_rows(TaskConfig(num_train=6, max_level=1), "train"), tmp_path / "t.parquet")
    options = [
        "--data",
        str(tmp_path / "t.parquet"),
        "--num-steps",
        "24",
        "--log-every",
        "8",
        "--warmup-steps",
        "4",
    ]
    assert small_run(tmp_path / "a", *options) == 0
    assert small_run(tmp_path / "b", *options) == 0
    log = [json.loads(line) for line in (tmp_path / "a" / "sft_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[-1]["tokens"] > log[0]["tokens"] > 0
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert len(weights) <= 5_000_000
    # The result is a model folder: it is the start of the next run.
    assert small_run(tmp_path / "c", *options, "--model", str(tmp_path / "a"), "--learning-rate", "1e-4") == 0
    again = [json.loads(line) for line in (tmp_path / "c" / "sft_log.jsonl").read_text().splitlines()]
    assert again[0]["loss"] < log[0]["loss"] - 0.5
    assert load_tokenizer(tmp_path / "c").encode("A") == [65]


def test_command_evaluates_the_task(tmp_path: Path) -> None:
    assert small_run(tmp_path, "--num-steps", "2", "--num-eval", "6", "--eval-every", "1") == 0
    log = [json.loads(line) for line in (tmp_path / "sft_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2]
    for record in log:
        assert set(record["sampled"]["by_level"]) == {"1", "2", "3", "4", "5", "6"}
        assert record["greedy"]["accuracy"] == 0.0
        assert record["sampled"]["length_p99"] <= 12


def test_shipped_policy_is_half_trained() -> None:
    """RL has something to sharpen: the format is there, greedy sums are mostly right, sampled ones less often."""
    folder = Path(str(files("slipstream.experiments"))) / "quickstart" / "policy"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5_000_000
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    task = TaskConfig(num_validation=96, max_level=3, seed=11)
    prompts = load_prompts(DataConfig(task=task), tokenizer, 0).validation
    torch.manual_seed(0)
    sampled = evaluate(model, tokenizer, prompts, max_new_tokens=128, greedy=False)
    greedy = evaluate(model, tokenizer, prompts, max_new_tokens=128, greedy=True)
    assert sampled["ended"] > 0.95
    assert 0.3 < sampled["accuracy"] < greedy["accuracy"] - 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num-steps", "0"], "--num-steps=0; allowed: 1 or more"),
        (["--curriculum", "2"], "--curriculum=2.0; allowed: 0 (off) to 1"),
        (["--slip-rate", "-0.1"], "--slip-rate=-0.1; allowed: 0 (off) to 1"),
        (["--data", "nowhere/deep/x.parquet"], "--data='nowhere/deep/x.parquet': no such file"),
    ],
)
def test_command_refuses_in_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert small_run(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1

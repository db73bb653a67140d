"""Rewards: what counts as right, and that no function can stop the job or turn into a silent zero."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slipstream.conf.schema import RewardConfig
from slipstream.trainer.data.prompts import Prompt
from slipstream.trainer.data.rewards import RewardScorer, Score, boxed_answer, final_part
from slipstream.trainer.errors import ConfigError, DataError

FUNCTIONS = """
import math, os, time
import numpy as np

CONSTANT = 3

def by_length(data_source, solution_str, ground_truth, extra_info=None):
    return len(solution_str) / 10

def as_dict(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": True, "seen": extra_info["index"]}

def at_last(data_source, solution_str, ground_truth, extra_info=None):
    attempts = len(os.listdir(ground_truth))
    open(os.path.join(ground_truth, str(attempts)), "w").close()
    if attempts >= 2:
        return 0.5
    if solution_str == "raise":
        raise RuntimeError("always")
    if attempts:
        os._exit(3)
    time.sleep(100)

def by_name(data_source, solution_str, ground_truth, extra_info=None):
    print("a chatty function")
    if solution_str == "raise":
        raise RuntimeError("first line\\nsecond line")
    if solution_str == "hang":
        while True:
            pass
    if solution_str == "hang in C":
        9 ** 9 ** 9
    if solution_str == "exit":
        os._exit(3)
    return {"numpy": np.float32(0.5), "true": True, "nan": math.nan, "inf": math.inf, "text": "1.0",
            "none": None, "dict": {"value": 1}, "lambda": lambda: 0, "ok": 1}[solution_str]
"""


def prompt(ground_truth: str = "19", source: str = "slipstream/chain_sum", style: str = "exact") -> Prompt:
    return Prompt(f"{source}/1", np.array([1], np.int32), source, style, ground_truth, 0, {"index": 4})


@pytest.fixture(scope="module")
def exact() -> RewardScorer:
    return RewardScorer(RewardConfig(rule="exact"))


@pytest.fixture(scope="module")
def math_scorer() -> Iterator[RewardScorer]:
    scorer = RewardScorer(RewardConfig(rule="math", timeout_s=60))
    yield scorer
    scorer.close()


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("response", "truth", "value"),
    [
        ("a+5=12\n#### 19", "19", 1.0),
        ("#### 18\n#### 19 ", "19", 1.0),
        ("#### 19\n#### 18", "19", 0.0),
        ("#### 19 apples", "19", 0.0),
        ("19", "19", 1.0),
        ("the answer is 19", "19", 0.0),
        ("#### 1,234", "1234", 1.0),
        ("#### 1,234", "1,234", 1.0),
        ("#### (1, 2)", "(1,2)", 1.0),
        ("#### (1,2)", "(12)", 0.0),
        ("", "19", 0.0),
        (r"so \boxed{19}", "19", 1.0),
        ("####", "", 1.0),
    ],
)
def test_exact(exact: RewardScorer, response: str, truth: str, value: float) -> None:
    assert exact.score(prompt(truth), response) == Score(value)


def test_boxes_balance_their_braces() -> None:
    assert boxed_answer(r"\boxed{1} then \boxed{\frac{1}{2}} done") == r"\frac{1}{2}"
    assert boxed_answer(r"\boxed{1} then \boxed{\frac{1}{2") == "1"
    assert boxed_answer("none") is None
    assert final_part(r"\boxed{3}" + "\n#### 4") == "4"


@pytest.mark.parametrize(
    ("response", "truth", "value"),
    [
        (r"The answer is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        ("#### 18.0", "18", 1.0),
        ("The answer is 18.", "18", 1.0),
        ("#### 17", "18", 0.0),
        (r"\boxed{17}", "18", 0.0),
        ("I do not know.", "18", 0.0),
        ("", "18", 0.0),
    ],
)
def test_math(math_scorer: RewardScorer, response: str, truth: str, value: float) -> None:
    assert math_scorer.score(prompt(truth, "openai/gsm8k", "rule"), response) == Score(value)


def test_math_works_off_the_main_thread(math_scorer: RewardScorer) -> None:
    scores: list[Score] = []
    question = prompt("0.5", "openai/gsm8k", "rule")
    threads = [
        threading.Thread(target=lambda: scores.append(math_scorer.score(question, r"\boxed{\frac{1}{2}}")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert scores == [Score(1.0)] * 3


def test_auto_rule_goes_by_style_and_source() -> None:
    scorer = RewardScorer(RewardConfig(timeout_s=60))
    for source in ("openai/gsm8k", "HuggingFaceH4/MATH-500", "aime_2024", "math_dapo"):
        assert scorer.score(prompt("1/2", source, "rule"), "#### 0.5").value == 1.0
    assert scorer.score(prompt("1/2", "slipstream/chain_sum", ""), "#### 0.5").value == 0.0
    assert scorer.score(prompt("1/2", "mine", "exact"), "#### 0.5").value == 0.0
    unknown = prompt("x", "codeforces", "rule")
    assert scorer.score(unknown, "x").value is None
    assert "codeforces" in scorer.score(unknown, "x").error
    scorer.check([prompt()])
    with pytest.raises(DataError, match=r"no rule for data_source 'codeforces'; set reward\.rule"):
        scorer.check([prompt(), unknown])
    RewardScorer(RewardConfig(rule="exact")).check([unknown])
    scorer.close()


@pytest.mark.usefixtures("functions")
def test_custom_function_is_called_as_verl_calls_it() -> None:
    scorer = RewardScorer(RewardConfig(rule="custom", function="my_rewards.by_length", timeout_s=60))
    assert scorer.score(prompt(), "12345") == Score(0.5)
    scorer.close()
    scorer = RewardScorer(RewardConfig(rule="custom", function="my_rewards.as_dict", timeout_s=60))
    assert scorer.score(prompt("7"), "7") == Score(1.0)
    scorer.close()


@pytest.mark.usefixtures("functions")
def test_custom_function_that_misbehaves_costs_one_sample(capfd: pytest.CaptureFixture[str]) -> None:
    scorer = RewardScorer(RewardConfig(rule="custom", function="my_rewards.by_name", timeout_s=1))
    expected = {
        "numpy": (0.5, ""),
        "true": (1.0, ""),
        "raise": (None, "raised RuntimeError: first line second line"),
        "nan": (None, "returned nan"),
        "inf": (None, "returned inf"),
        "text": (None, "returned '1.0', not a number"),
        "none": (None, "returned None, not a number"),
        "dict": (None, "without 'score'"),
        "lambda": (None, "cannot be pickled"),
        "exit": (None, "died (exit code 3) in each of 2 attempts"),
        "hang": (None, "longer than reward.timeout_s=1 in each of 2 attempts"),
        "hang in C": (None, "longer than reward.timeout_s=1"),
        "ok": (1.0, ""),
    }
    for response, (value, error) in expected.items():
        score = scorer.score(prompt(), response)
        assert score.value == value, response
        assert error in score.error
        assert "\n" not in score.error
    assert "a chatty function" in capfd.readouterr().err
    scorer.close()


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("response", "max_retries", "expected", "attempts"),
    [
        ("hang, die, answer", 2, Score(0.5), 3),
        ("hang", 0, Score(None, "the custom reward took longer than reward.timeout_s=0.5"), 1),
        ("raise", 2, Score(None, "the custom reward raised RuntimeError: always"), 1),
    ],
)
def test_a_scoring_that_gave_no_answer_is_tried_again(
    response: str, max_retries: int, expected: Score, attempts: int, tmp_path: Path
) -> None:
    seen = tmp_path / "attempts"
    seen.mkdir()
    reward = RewardConfig(rule="custom", function="my_rewards.at_last", timeout_s=0.5, max_retries=max_retries)
    scorer = RewardScorer(reward)
    assert scorer.score(prompt(str(seen)), response) == expected
    assert len(list(seen.iterdir())) == attempts
    scorer.close()


def test_custom_function_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_here.py").write_text("def reward(*arguments):\n    return 0.25\n")
    monkeypatch.chdir(tmp_path)
    scorer = RewardScorer(RewardConfig(rule="custom", function="rewards_here.reward", timeout_s=60))
    assert scorer.score(prompt(), "x") == Score(0.25)
    scorer.close()


@pytest.mark.usefixtures("functions")
def test_helper_ends_with_its_scorer() -> None:
    scorer = RewardScorer(RewardConfig(rule="custom", function="my_rewards.by_length", timeout_s=60))
    process = scorer._process._process
    assert process is not None
    os.kill(process.pid, 0)
    del scorer
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is not None


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("my_rewards.by_lenght", "has no 'by_lenght'; nearest: my_rewards.by_length"),
        ("my_rewards.CONSTANT", "'CONSTANT' is a int, not a function"),
        ("no_such_module.reward", "'no_such_module' cannot be imported (ModuleNotFoundError"),
        ("reward", "allowed: a dotted path package.module.function"),
    ],
)
def test_unusable_function_is_one_line_at_the_start(path: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        RewardScorer(RewardConfig(rule="custom", function=path))
    assert str(error.value).startswith(f"reward.function={path!r}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)

"""Evaluation: unbiased best@k, votes, verl's names, and rollouts that arrive in any order."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.conf.schema import DataConfig, EvaluationConfig, RewardConfig
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid
from slipstream.trainer.config import model_folder
from slipstream.trainer.data.prompts import PromptSet, load_prompts
from slipstream.trainer.data.rewards import RewardScorer
from slipstream.trainer.data.tokenizer import ChatTokenizer, load_tokenizer
from slipstream.trainer.evaluation import Evaluation, best_of, majority, validation_metrics

SAMPLING = Sampling(64, temperature=1.0, seed=3)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7), st.data())
def test_best_of_k_is_the_mean_over_all_subsets(rewards: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rewards)))
    expected = np.mean([max(subset) for subset in itertools.combinations(rewards, k)])
    assert best_of(rewards, k) == pytest.approx(expected, abs=1e-9)


def test_pass_at_k_by_hand() -> None:
    assert best_of([1, 0, 0, 0], 2) == pytest.approx(0.5)  # 1 - C(3, 2) / C(4, 2)
    with pytest.raises(ValueError, match="allowed: 1 to 4"):
        best_of([1, 0, 0, 0], 5)


def test_the_most_frequent_answer_decides_and_the_first_of_equals() -> None:
    assert majority([0.0, 1.0, 1.0], ["7", "8", "8"]) == 1.0
    assert majority([0.0, 1.0], ["7", "8"]) == 0.0


def test_names_are_verls() -> None:
    metrics = validation_metrics("gsm8k", [[1.0, 0, 0, 1], [0, 0, 0, 0]], [list("abca"), list("dddd")])
    assert {name: metrics[name] for name in metrics if name.startswith("val-core")} == pytest.approx(
        {
            "val-core/gsm8k/reward/mean@4": 0.25,
            "val-core/gsm8k/reward/best@4/mean": 0.5,
            "val-core/gsm8k/reward/maj@4/mean": 0.5,
        }
    )
    assert metrics["val-aux/gsm8k/reward/best@2/mean"] == pytest.approx((5 / 6) / 2)
    assert metrics["val-aux/gsm8k/reward/worst@2/mean"] == pytest.approx((1 / 6) / 2)
    single = validation_metrics("gsm8k", [[1.0], [0.0]], [["a"], ["b"]])
    assert single == {"val-core/gsm8k/reward/mean@1": 0.5}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(str(model_folder("builtin:chain_sum")))


@pytest.fixture(scope="module")
def prompts(tokenizer: ChatTokenizer) -> PromptSet:
    return load_prompts(DataConfig(), tokenizer, seed=0)


def answer(request: Request, text: str, tokenizer: ChatTokenizer, version: int) -> Rollout:
    tokens = np.array(tokenizer.encode(text), np.int32)
    versions = np.full(len(tokens), version, np.int32)
    return Rollout(request, tokens, np.zeros(len(tokens), np.float32), versions, "length")


def test_an_evaluation_ends_with_its_last_rollout(prompts: PromptSet, tokenizer: ChatTokenizer) -> None:
    config = EvaluationConfig(every_steps=2, num_samples_per_prompt=2, max_prompts=3, temperature=0.5)
    evaluation = Evaluation(config, prompts.validation, SAMPLING, RewardScorer(RewardConfig()), tokenizer)
    requests = evaluation.start(4)
    assert len(requests) == 6
    assert {request.sampling.temperature for request in requests} == {0.5}
    training = {request_uid(3, step, group, 0) for step in range(9) for group in range(9)}
    assert not training & {request.uid for request in requests}
    assert evaluation.num_open == 1
    order = np.random.default_rng(0).permutation(6)
    for i in order[:-1]:
        request = requests[i]
        right = f"#### {prompts.validation[request.group].ground_truth}"
        assert evaluation.deliver(answer(request, right if request.group == 0 else "#### no", tokenizer, 4))
    assert evaluation.ended() == {}
    evaluation.deliver(answer(requests[order[-1]], "#### no", tokenizer, 6))
    metrics = evaluation.ended()
    assert (metrics["val-aux/step"], metrics["val-aux/policy_version/max"]) == (4, 6)
    right = sum(request.group == 0 for request in (requests[i] for i in order[:-1]))
    source = prompts.validation[0].data_source
    assert metrics[f"val-core/{source}/reward/mean@2"] == pytest.approx(right / 6)
    assert evaluation.ended() == {}
    assert evaluation.num_open == 0
    other = Request(training.pop(), "p", 0, np.array([1], np.int32), SAMPLING)
    assert not evaluation.deliver(answer(other, "#### 1", tokenizer, 0)), "a training rollout was taken"
    assert Counter(request.uid for request in requests).most_common(1)[0][1] == 1

"""Packed sequences: the same log-probabilities, gradients and updates as padded rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from slipstream.conf.learning import AlgoConfig, LearnerConfig
from slipstream.trainer.batch import TrainSample, pack, pad
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.packed_attention import batch_logprobs, probe_packing, use_packed_attention
from slipstream.trainer.policy import LearnerSpec, PolicyLearner
from tests.learner_weights import weights_of
from tests.tiny_models import FAMILIES, tiny_model


def make_samples(seed: int, num: int = 6) -> list[TrainSample]:
    rng = np.random.default_rng(seed)
    return [
        TrainSample(
            rng.integers(3, 96, rng.integers(1, 9)).astype(np.int32),
            rng.integers(3, 96, length := rng.integers(1, 20)).astype(np.int32),
            rng.normal(-4, 0.3, length).astype(np.float32),
            float(rng.normal()),
        )
        for _ in range(num)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_log_probabilities_are_the_padded_ones(family: str) -> None:
    """Also where a layer sees a window only: the tests' windows are shorter than their texts."""
    samples, order = make_samples(0), [4, 0, 2, 5]
    padded, packed = pad(samples, order), pack(samples, order)
    model = tiny_model(family)
    model.set_attn_implementation("sdpa")
    expected = batch_logprobs(model, padded, 0.7)
    use_packed_attention(model, "learner.packing")
    probe_packing(model, "learner.packing")
    actual = batch_logprobs(model, packed, 0.7)
    for one, other in zip(expected, actual, strict=True):
        for row in range(len(order)):
            torch.testing.assert_close(
                one[row, padded.rows.mask[row]], other[row, packed.rows.mask[row]], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("change", [{}, {"loss": "gspo"}, {"kl_coef": 0.1, "loss_agg": "seq-mean-token-mean"}], ids=str)
def test_packed_updates_are_the_padded_ones(change: dict[str, object], tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    algo = AlgoConfig.model_validate(
        {"num_steps": 5, "max_staleness_steps": 1, "max_tokens_per_microbatch": 64} | change
    )
    results = []
    for packing in (False, True):
        spec = LearnerSpec(str(tmp_path), "float32", None, 0.0, 1, 1.0, 20, algo, LearnerConfig(packing=packing))
        learner = PolicyLearner(spec)
        results.append(([learner.update(make_samples(seed), seed) for seed in (1, 2, 3)], weights_of(learner)))
    (padded, before), (packed, after) = results
    for one, other in zip(padded, packed, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=0)


def test_activation_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    for packing in (False, True):
        weights = []
        for checkpointing in (False, True):
            config = LearnerConfig(packing=packing, activation_checkpointing=checkpointing)
            learner = PolicyLearner(LearnerSpec(str(tmp_path), "float32", None, 0.0, 1, 1.0, 20, AlgoConfig(), config))
            recomputed = 0

            def count(*_: object) -> None:
                nonlocal recomputed
                recomputed += 1

            learner._model.model.layers[0].mlp.register_forward_pre_hook(count)
            learner.update(make_samples(1), 1)
            weights.append(weights_of(learner))
            assert recomputed == (2 if checkpointing else 1)
        for name, tensor in weights[0].items():
            assert torch.equal(tensor, weights[1][name])


def test_a_model_that_mixes_sequences_is_refused() -> None:
    model = tiny_model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match=r"learner.packing=true.*linear_attention.*learner.packing=false"):
        use_packed_attention(model, "learner.packing")
    leaky = tiny_model("qwen3")
    use_packed_attention(leaky, "learner.packing")
    # What a convolution or a state over the row would do.
    leaky.model.layers[0].register_forward_hook(lambda module, args, output: output + output.roll(1, dims=1))
    with pytest.raises(ConfigError, match=r"learner.packing=true.*see other sequences"):
        probe_packing(leaky, "learner.packing")


def test_attention_that_was_not_told_the_sequences_raises() -> None:
    model = tiny_model("qwen3")
    use_packed_attention(model, "learner.packing")
    with pytest.raises(ValueError, match="sequence_lengths"):
        model(input_ids=torch.arange(3, 9)[None])

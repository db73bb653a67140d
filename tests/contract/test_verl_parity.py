"""Advantages, policy loss, KL and aggregation agree with verl's own functions to 1e-6 on ragged batches."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from slipstream.trainer.advantages import Advantage, compute_advantages
from slipstream.trainer.correction import Rejection, Weights, correct
from slipstream.trainer.losses import (
    Aggregation,
    KlEstimator,
    PolicyLoss,
    aggregate,
    kl_penalty,
    policy_loss,
    token_logprobs,
)

pytest.importorskip("verl", reason="compares with verl; install the extra: pip install 'slipstream[verl]'")
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.utils import torch_functional
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.workers.config import FSDPActorConfig

TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}


def ragged_batch(seed: int) -> dict[str, torch.Tensor]:
    """Rows of 0 to 17 tokens, ratios on both sides of every clip, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = 9, 17
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    lengths[seed % rows] = 0
    old_logp = -torch.rand((rows, width), generator=generator, dtype=torch.float64) * 6
    return {
        "old_logp": old_logp,
        "logp": old_logp + torch.randn(old_logp.shape, generator=generator, dtype=torch.float64),
        "advantages": torch.randn((rows, 1), generator=generator, dtype=torch.float64).expand(rows, width),
        "mask": (torch.arange(width) < lengths).to(torch.float64),
    }


def verl_actor(mask: torch.Tensor, low: float, high: float, dual: float) -> Any:
    """verl's actor settings with the totals of the whole step filled in."""
    config = FSDPActorConfig(
        strategy="fsdp",
        ppo_micro_batch_size_per_gpu=1,
        rollout_n=4,
        clip_ratio=low,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual,
    )
    config.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=int(mask.sum()),
        global_batch_size=int(mask.any(-1).sum()),
        loss_scale_factor=None,
    )
    return config


def verl_advantages(name: Advantage, *args: Any) -> torch.Tensor:
    match name:
        case "rloo":
            return core_algos.compute_rloo_outcome_advantage(*args)[0]
        case "reinforce_pp_baseline":
            return core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(*args)[0]
    return core_algos.compute_grpo_outcome_advantage(*args, norm_adv_by_std_in_grpo=name == "grpo")[0]


@pytest.mark.parametrize("name", get_args(Advantage))
@pytest.mark.parametrize("seed", range(5))
def test_advantages(seed: int, name: Advantage) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 7, 40)
    rewards = rng.choice([0.0, 1.0], 40) if seed % 2 else rng.normal(size=40)
    # A group of one and a group of equal rewards, each a rule of its own.
    groups[0], rewards[0] = 100, 0.7
    groups[1:4], rewards[1:4] = 101, 1.0
    lengths = rng.integers(1, 12, 40)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).to(torch.float64)
    token_rewards = torch.zeros(40, 12, dtype=torch.float64)
    token_rewards[torch.arange(40), torch.tensor(lengths) - 1] = torch.tensor(rewards)
    expected = verl_advantages(name, token_rewards, mask, groups)
    advantages, _ = compute_advantages(name, rewards, groups, lengths)
    ours = torch.from_numpy(advantages).double()[:, None] * mask
    torch.testing.assert_close(ours, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", get_args(PolicyLoss))
@pytest.mark.parametrize("mode", get_args(Aggregation))
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.28, 10.0), (0.2, 0.2, 3.0), (0.1, 5.0, 1.5)])
def test_policy_loss_and_gradient(mode: Aggregation, low: float, high: float, dual: float, kind: PolicyLoss) -> None:
    names = {"ppo_clip": "vanilla"}
    for seed in range(4):
        batch = ragged_batch(seed)
        mask = batch["mask"]
        weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
        theirs = batch["logp"].clone().requires_grad_()
        config = verl_actor(mask, low, high, dual)
        config.global_batch_info["loss_scale_factor"] = 23
        expected, expected_metrics = core_algos.get_policy_loss_fn(names.get(kind, kind))(
            old_log_prob=batch["old_logp"],
            log_prob=theirs,
            advantages=batch["advantages"],
            response_mask=mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=weights,
        )
        expected.backward()

        ours = batch["logp"].clone().requires_grad_()
        losses, metrics = policy_loss(
            ours, batch["old_logp"], batch["advantages"], mask, low, high, dual, int(mask.sum()), kind
        )
        loss = aggregate(losses * weights, mask, mode, int(mask.sum()), int(mask.any(-1).sum()), horizon=23)
        loss.backward()

        torch.testing.assert_close(loss, expected, **TOLERANCE)
        torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE)
        assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected_metrics, abs=1e-6)


@pytest.mark.parametrize("estimator", get_args(KlEstimator))
def test_kl_penalty(estimator: KlEstimator) -> None:
    for scale in (0.1, 1.0, 30.0):
        batch = ragged_batch(seed=3)
        theirs, ours = (batch["logp"].clone().requires_grad_() for _ in range(2))
        expected = core_algos.kl_penalty(theirs, batch["old_logp"] * scale, estimator)
        value = kl_penalty(ours, batch["old_logp"] * scale, estimator)
        torch.testing.assert_close(value, expected, **TOLERANCE)
        expected.sum().backward()
        value.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE)


def test_token_logprobs_and_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((4, 6, 50), generator=generator, dtype=torch.float64) * 4
    targets = torch.randint(0, 50, (4, 6), generator=generator)
    logp, entropy = token_logprobs(logits, targets, temperature=0.6)
    expected = torch_functional.logprobs_from_logits(logits / 0.6, targets, inplace_backward=False)
    torch.testing.assert_close(logp, expected, **TOLERANCE)
    torch.testing.assert_close(entropy, torch_functional.entropy_from_logits(logits / 0.6), **TOLERANCE)


@pytest.mark.parametrize("rejection", get_args(Rejection))
@pytest.mark.parametrize("weights", get_args(Weights))
@pytest.mark.parametrize("seed", range(3))
def test_correction(weights: Weights, rejection: Rejection, seed: int) -> None:
    batch = ragged_batch(seed)
    # verl divides by zero tokens in a row without any; close policies, so that some sequences pass.
    rows = batch["mask"].bool().any(-1)
    mask, rollout = batch["mask"][rows], batch["old_logp"][rows]
    learner = rollout + 0.2 * (batch["logp"] - batch["old_logp"])[rows]
    low, high = 0.8, 1.3
    verl_rejection = {"token": "token_k1", "sequence": "seq_sum_k1", "sequence_mean": "seq_mean_k1"}.get(rejection)
    proto, expected_mask, expected = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
        old_log_prob=learner,
        rollout_log_prob=rollout,
        response_mask=mask,
        rollout_is={"off": None, "icepop": "token"}.get(weights, weights),
        rollout_is_threshold=f"{low}_{high}" if weights == "icepop" else high,
        rollout_rs=verl_rejection,
        # verl bounds p_rollout / p_learner.
        rollout_rs_threshold=f"{1 / high}_{1 / low}" if verl_rejection else None,
    )
    done = correct(learner, rollout, mask, weights, (low, high), rejection, (low, high))
    torch.testing.assert_close(done.keep.to(mask.dtype), expected_mask, **TOLERANCE)
    if weights == "off":
        assert done.weights is None
    else:
        torch.testing.assert_close(done.weights, proto.batch["rollout_is_weights"], **TOLERANCE)
    shared = {name: value for name, value in done.metrics.items() if name in expected}
    assert shared == pytest.approx({name: expected[name] for name in shared}, rel=1e-5, abs=1e-6)
    assert set(done.metrics) - set(expected) == {name for name in done.metrics if name.startswith("training/")}
    assert len(shared) >= 13


def test_probability_differences() -> None:
    batch = ragged_batch(1)
    tensors = {
        "rollout_log_probs": batch["old_logp"],
        "old_log_probs": batch["logp"],
        "response_mask": batch["mask"],
        "responses": torch.zeros(batch["mask"].shape, dtype=torch.int64),
    }
    expected = calculate_debug_metrics(DataProto.from_dict(tensors=tensors))
    metrics = correct(batch["logp"], batch["old_logp"], batch["mask"], "off", (1, 1), "off", (1, 1)).metrics
    names = [name for name in metrics if name.startswith("training/")]
    assert len(names) == 4
    assert {name: metrics[name] for name in names} == pytest.approx({name: expected[name] for name in names}, abs=1e-6)

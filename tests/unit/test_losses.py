"""Policy loss: worked examples, and invariance of value and gradient under any split into micro-batches."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slipstream.trainer.losses import Aggregation, PolicyLoss, aggregate, kl_penalty, policy_loss, token_logprobs

MODES = get_args(Aggregation)


def ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, old_logp, advantages [B, 1], mask) in float64 for rows of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max([*lengths, 1]))
    logp = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    old_logp = logp + torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
    advantages = torch.randn((shape[0], 1), generator=generator, dtype=torch.float64)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return logp, old_logp, advantages, mask


def test_token_logprobs_follow_the_temperature() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, -math.inf]], dtype=torch.float64)
    logp, entropy = token_logprobs(logits, torch.tensor([1, 0]), temperature=1.0)
    torch.testing.assert_close(logp, torch.tensor([math.log(0.75), 0.0], dtype=torch.float64))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(entropy, torch.tensor([expected, 0.0], dtype=torch.float64))
    halved, _ = token_logprobs(logits, torch.tensor([1, 0]), temperature=2.0)
    assert halved[0].item() == pytest.approx(math.log(math.sqrt(3) / (1 + math.sqrt(3))))


def test_token_logprobs_gradient_and_precision() -> None:
    logits = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    logp, entropy = token_logprobs(logits, torch.tensor([0, 1, 2]), temperature=0.7)
    assert logp.dtype == torch.float32
    assert not entropy.requires_grad
    logp.sum().backward()
    assert logits.grad is not None
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(logits, torch.tensor([0, 1, 2]), temperature=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "lower"),
    [
        (1.0, 2.0, -2.0, 0, 0),
        (1.5, 1.0, -1.28, 1, 0),  # above the upper clip: the gain stops at 1.28
        (0.5, 1.0, -0.5, 0, 0),
        (0.5, -1.0, 0.8, 1, 0),  # below the lower clip
        (5.0, -1.0, 3.0, 0, 1),  # dual clip at 3
        (2.0, -1.0, 2.0, 0, 0),
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, clipped: int, lower: int) -> None:
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    losses, metrics = policy_loss(
        logp, torch.zeros_like(logp), torch.full_like(logp, advantage), torch.ones(1, 1), 0.2, 0.28, 3.0
    )
    assert losses.item() == pytest.approx(loss)
    assert metrics["actor/pg_clipfrac"].item() == clipped
    assert metrics["actor/pg_clipfrac_lower"].item() == lower
    assert metrics["actor/ppo_kl"].item() == pytest.approx(-math.log(ratio))


def test_clipped_tokens_carry_no_gradient() -> None:
    logp = torch.tensor([[math.log(1.5), math.log(1.1)]], requires_grad=True)
    losses, _ = policy_loss(logp, torch.zeros(1, 2), torch.ones(1, 1), torch.ones(1, 2), 0.2, 0.28, 10.0)
    losses.sum().backward()
    assert logp.grad is not None
    assert logp.grad[0, 0] == 0
    assert logp.grad[0, 1].item() == pytest.approx(-1.1)


def test_dual_clip_must_be_above_one() -> None:
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(*ragged([2]), 0.2, 0.28, 1.0)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_kl_estimators_by_hand(estimator: str, expected: float) -> None:
    logp = torch.tensor([-1.0], dtype=torch.float64)
    assert kl_penalty(logp, logp - 0.5, estimator).item() == pytest.approx(expected)  # type: ignore[arg-type]
    assert kl_penalty(logp, logp, estimator).item() == 0  # type: ignore[arg-type]


def test_k3_is_cut_and_unknown_names_are_refused() -> None:
    assert kl_penalty(torch.tensor(-50.0), torch.tensor(0.0), "k3").item() == 10
    with pytest.raises(ValueError, match="allowed: k1, k2, k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed: token-mean"):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1), "mean", 1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_tokens_total=0"):
        aggregate(torch.zeros(1, 1), torch.zeros(1, 1), "token-mean", 0, 1)


def test_aggregation_modes_by_hand() -> None:
    loss = torch.tensor([[1.0, 2, 3], [5, math.nan, math.inf]])
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    values = {mode: aggregate(loss, mask, mode, 4, 2, horizon=10).item() for mode in MODES}
    by_hand = {"token-mean": 11 / 4, "seq-mean-token-sum": 11 / 2, "seq-mean-token-mean": 3.5}
    assert values == pytest.approx(by_hand | {"seq-mean-token-sum-norm": 0.55})
    with pytest.raises(ValueError, match="horizon is None"):
        aggregate(loss, mask, "seq-mean-token-sum-norm", 4, 2)


def test_gspo_by_hand() -> None:
    ratios = torch.tensor([[2.0, 0.5, 1.0], [1.5, 1.5, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    logp = ratios.log().requires_grad_()
    advantages = torch.ones(2, 1, dtype=torch.float64)
    losses, metrics = policy_loss(logp, torch.zeros(2, 3), advantages, mask, 0.2, 0.28, 3.0, kind="gspo")
    # The first sequence's ratios cancel; the second's geometric mean of 1.5 is clipped at 1.28.
    torch.testing.assert_close(losses[0], torch.full((3,), -1.0, dtype=torch.float64))
    torch.testing.assert_close(losses[1, :2], torch.full((2,), -1.28, dtype=torch.float64))
    assert metrics["actor/pg_clipfrac"].item() == pytest.approx(2 / 5)
    losses[mask.bool()].sum().backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([-1.0, -1.0, -1.0])
    assert logp.grad[1].tolist() == [0, 0, 0]


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    logp = torch.tensor([[math.log(3.0), math.log(0.9)]], requires_grad=True)
    losses, metrics = policy_loss(
        logp, torch.zeros(1, 2), 2 * torch.ones(1, 1), torch.ones(1, 2), 1.0, 0.5, 3.0, kind="cispo"
    )
    losses.sum().backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([-2 * 1.5, -2 * 0.9])
    assert metrics["actor/pg_clipfrac"].item() == 0.5


def test_unknown_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed: ppo_clip, gspo, cispo"):
        policy_loss(*ragged([2]), 0.2, 0.28, 3.0, kind="a2c")  # type: ignore[arg-type]


def step_loss(
    rows: tuple[Tensor, ...], mode: Aggregation, totals: tuple[int, int], kind: PolicyLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss plus KL of some rows of a step, and the metrics."""
    logp, old_logp, advantages, mask = rows
    losses, metrics = policy_loss(logp, old_logp, advantages, mask, 0.2, 0.28, 3.0, totals[0], kind)
    losses = losses + 0.1 * kl_penalty(logp, old_logp, "k3")
    return aggregate(losses, mask, mode, *totals, horizon=9), metrics


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=10).filter(lambda lengths: sum(lengths) > 0),
    cuts=st.sets(st.integers(1, 9)),
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(get_args(PolicyLoss)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_any_split_gives_the_same_value_gradient_and_metrics(
    lengths: list[int], cuts: set[int], mode: Aggregation, kind: PolicyLoss, seed: int
) -> None:
    logp, old_logp, advantages, mask = ragged(lengths, seed)
    totals = (int(mask.sum()), int(mask.any(-1).sum()))
    whole_logp = logp.clone().requires_grad_()
    whole, whole_metrics = step_loss((whole_logp, old_logp, advantages, mask), mode, totals, kind)
    whole.backward()

    split_logp = logp.clone().requires_grad_()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(lengths)), len(lengths)]
    total = 0.0
    metrics = dict.fromkeys(whole_metrics, 0.0)
    for start, stop in itertools.pairwise(bounds):
        # Each micro-batch is padded to its own longest row, as in training.
        width = max([*lengths[start:stop], 1])
        rows = (split_logp[start:stop, :width], old_logp[start:stop, :width], advantages[start:stop])
        part, part_metrics = step_loss((*rows, mask[start:stop, :width]), mode, totals, kind)
        part.backward()
        total += part.item()
        metrics = {name: value + part_metrics[name].item() for name, value in metrics.items()}

    assert total == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(split_logp.grad, whole_logp.grad, atol=1e-12, rtol=0)
    assert metrics == pytest.approx({name: value.item() for name, value in whole_metrics.items()}, abs=1e-12)

"""Correction of samples that another policy than the learner's drew: importance weights, masks and diagnostics.

Invariants
- ratio = p_learner / p_rollout per token, the learner being the policy at the start of the step (the proximal policy
  of decoupled PPO, arXiv 2110.00641): the objective is w * PPO(p_theta / p_learner), so that the clip bounds the
  step and w alone pays for staleness and for the difference between engine and learner.
- Weights and masks are constants: no gradient flows through them.
- Where both policies agree, every weight is 1 and nothing is masked.
- Padding has weight 0 and moves no metric.
Metrics carry verl's names and meanings (its rollout_corr/* and training/*).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from slipstream.conf.learning import AlgoConfig
from slipstream.trainer.batch import TrainSample

Weights = Literal["off", "token", "sequence", "icepop"]
Rejection = Literal["off", "token", "sequence", "sequence_mean"]

MAX_LOG_RATIO = 20.0
"""Log-ratios of tokens and of sequences are cut here before `exp`, as in verl."""
EPS = 1e-8


@dataclass(frozen=True, slots=True)
class Corrected:
    """weights: [N, L], 0 at padding, None when off; keep: [N, L] bool, tokens to train on; metrics: verl's names."""

    weights: Tensor | None
    keep: Tensor
    metrics: dict[str, float]


def correct_samples(
    samples: Sequence[TrainSample], learner_logps: Sequence[np.ndarray], algo: AlgoConfig
) -> tuple[list[TrainSample], dict[str, float]]:
    """The samples of a step with proximal log-probabilities, weights and mask as `algo.correction` says, and metrics.

    learner_logps: [len(response)] float32 for each sample, under the weights before the first update. Samples without
    a token left to train on are left out.
    """
    shape = len(samples), max(len(sample.response) for sample in samples)
    learner, rollout = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    mask = np.zeros(shape, bool)
    for row, (sample, logp) in enumerate(zip(samples, learner_logps, strict=True)):
        here = row, slice(0, len(sample.response))
        learner[here], rollout[here], mask[here] = logp, sample.logprobs, True
    setting = algo.correction
    done = correct(
        torch.from_numpy(learner),
        torch.from_numpy(rollout),
        torch.from_numpy(mask),
        algo.weights,
        (setting.weight_low, setting.weight_high),
        setting.rejection,
        (setting.rejection_low, setting.rejection_high),
    )
    out = []
    for row, (sample, logp) in enumerate(zip(samples, learner_logps, strict=True)):
        length = len(sample.response)
        weights = None if done.weights is None else done.weights[row, :length].numpy()
        out.append(replace(sample, proximal=logp, weights=weights, keep=done.keep[row, :length].numpy()))
    return [sample for sample in out if sample.num_tokens], done.metrics


def correct(
    learner_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    weights: Weights,
    weight_bounds: tuple[float, float],
    rejection: Rejection,
    rejection_bounds: tuple[float, float],
) -> Corrected:
    """Weights, mask and metrics of a whole step.

    learner_logp, rollout_logp: [N, L] log-probabilities of the sampled tokens, one response a row; mask: [N, L], true
    where there is a token. Bounds are (lowest, highest) ratio; weights "token" and "sequence" use the highest alone.
    Raises ValueError when no token is left to look at or a bound is not positive.
    """
    mask = mask.bool()
    if not mask.any():
        raise ValueError("the mask holds no token; allowed: at least one")
    log_ratio = torch.where(mask, learner_logp - rollout_logp, 0.0)
    metrics = off_policy_metrics(learner_logp, rollout_logp, mask)
    applied = None
    if weights != "off":
        applied, weight_metrics = importance_weights(log_ratio, mask, weights, weight_bounds)
        metrics |= weight_metrics
    keep = mask
    if rejection != "off":
        keep = mask & rejection_mask(log_ratio, mask, rejection, rejection_bounds)
        rejected = mask & ~keep
        metrics |= {
            "rollout_corr/rollout_rs_masked_fraction": float(rejected.sum() / mask.sum()),
            "rollout_corr/rollout_rs_seq_masked_fraction": float(rejected.any(-1).float().mean()),
        }
    return Corrected(applied, keep, metrics)


def importance_weights(
    log_ratio: Tensor, mask: Tensor, kind: Weights, bounds: tuple[float, float]
) -> tuple[Tensor, dict[str, float]]:
    """[N, L] weights without gradient, and their statistics.

    token: min(ratio, highest), truncated importance sampling per token ("Your efficient RL framework secretly brings
    you off-policy RL training", Yao et al. 2025). sequence: the product of a response's ratios, truncated likewise
    (Espeholt et al., IMPALA, arXiv 1802.01561, truncate such products); unbiased below the bound, of high variance.
    icepop: the token's ratio inside [lowest, highest] and 0 outside, which masks the token (IcePop: "Every step
    evolves", arXiv 2510.18855).

    log_ratio, mask: [N, L]. bounds: (lowest, highest).
    """
    lowest, highest = _checked(bounds)
    if kind == "sequence":
        log_raw = _sum(log_ratio, mask)[:, None]
    elif kind in ("token", "icepop"):
        log_raw = log_ratio
    else:
        raise ValueError(f"weights are {kind!r}; allowed: {', '.join(get_args(Weights))}")
    raw = log_raw.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(log_ratio) * mask
    inside = (raw >= lowest) & (raw <= highest)
    weights = torch.where(inside, raw, 0.0) if kind == "icepop" else raw.clamp(max=highest)
    return weights, _weight_metrics(weights, raw, mask, kind, lowest if kind == "icepop" else 1 / highest, highest)


def rejection_mask(log_ratio: Tensor, mask: Tensor, kind: Rejection, bounds: tuple[float, float]) -> Tensor:
    """[N, L] bool, false where a token or its whole response is too far off to be trained on.

    token: the token's ratio lies outside [lowest, highest]. sequence: the product of the response's ratios does.
    sequence_mean: their geometric mean does ("When speed kills stability", Liu and Li et al. 2025). The three are
    verl's token_k1, seq_sum_k1 and seq_mean_k1, whose thresholds are those of 1 / ratio.

    log_ratio, mask: [N, L].
    """
    lowest, highest = (math.log(bound) for bound in _checked(bounds))
    match kind:
        case "token":
            statistic = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        case "sequence" | "sequence_mean":
            cut = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            statistic = _sum(cut, mask)[:, None]
            if kind == "sequence_mean":
                statistic = statistic / mask.sum(-1, keepdim=True).clamp(min=1)
        case _:
            raise ValueError(f"rejection is {kind!r}; allowed: {', '.join(get_args(Rejection))}")
    return ((statistic >= lowest) & (statistic <= highest)).expand_as(log_ratio)


def off_policy_metrics(learner_logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the learner is from the policy that sampled.

    kl and k3_kl estimate KL(rollout || learner) from the sampled tokens (mean of -log ratio, and of ratio - 1 - log
    ratio); chi2_token is E[ratio^2] - 1, chi2_seq the same of whole responses; ppl are means over responses of
    exp(-mean log p). training/rollout_probs_diff_* compare probabilities. All arguments [N, L].
    """
    rows = mask.bool().any(-1)
    mask, learner, rollout = mask.bool()[rows], learner_logp[rows], rollout_logp[rows]
    log_ratio = learner - rollout
    learner_mean, rollout_mean = _mean(learner, mask), _mean(rollout, mask)
    difference = rollout_mean - learner_mean
    of_sequence = _sum(log_ratio, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    of_token = log_ratio[mask]
    squared = (2 * of_token.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).exp()
    values = {
        "kl": -of_token.mean(),
        "k3_kl": (of_token.exp() - of_token - 1).mean(),
        "chi2_token": squared.mean() - 1,
        "chi2_seq": (2 * of_sequence).exp().mean() - 1,
        "training_ppl": (-learner_mean).exp().mean(),
        "training_log_ppl": -learner_mean.mean(),
        "rollout_ppl": (-rollout_mean).exp().mean(),
        "rollout_log_ppl": -rollout_mean.mean(),
        "log_ppl_diff": difference.mean(),
        "log_ppl_abs_diff": difference.abs().mean(),
        "log_ppl_diff_max": difference.max(),
        "log_ppl_diff_min": difference.min(),
        "ppl_ratio": difference.exp().mean(),
    }
    apart = (learner[mask].exp() - rollout[mask].exp()).abs()
    probabilities = {
        "rollout_probs_diff_mean": apart.mean(),
        "rollout_probs_diff_max": apart.max(),
        "rollout_probs_diff_std": apart.std() if len(apart) > 1 else apart.sum() * 0,
        "rollout_actor_probs_pearson_corr": _pearson(learner[mask].exp(), rollout[mask].exp()),
    }
    return {f"rollout_corr/{name}": float(value) for name, value in values.items()} | {
        f"training/{name}": float(value) for name, value in probabilities.items()
    }


def _weight_metrics(
    weights: Tensor, raw: Tensor, mask: Tensor, kind: Weights, lowest: float, highest: float
) -> dict[str, float]:
    """mean, std, max, min and effective sample size of what is applied; shares beyond the bounds before truncation."""
    applied, before = weights[mask], raw[mask]
    mean, square = applied.mean(), applied.square().mean()
    # The sample size is that of normalised weights: 1 / mean((w / mean w)^2).
    values = {
        "mean": mean,
        "std": (square - mean.square()).clamp(min=0).sqrt(),
        "eff_sample_size": (mean + EPS).square() / square.clamp(min=EPS),
    }
    if kind == "sequence":
        of_row = raw[mask.any(-1)].amax(-1)
        values |= {"max": of_row.max(), "min": of_row.min()}
        before = of_row
    else:
        values |= {"max": applied.max(), "min": applied.min()}
    high, low = (before > highest).double().mean(), (before < lowest).double().mean()
    values |= {"ratio_fraction_high": high, "ratio_fraction_low": low}
    if kind == "icepop":
        values["oob_ratio"] = high + low
    return {f"rollout_corr/rollout_is_{name}": float(value) for name, value in values.items()}


def _checked(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"bounds are {bounds}; allowed: (lowest, highest), above 0 and in this order")
    return bounds


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(-1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return _sum(values, mask) / mask.sum(-1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two flat tensors; 1 when neither varies and they are equal."""
    x, y = a - a.mean(), b - b.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return (x * y).sum() / scale if scale > 0 else torch.full_like(scale, float(torch.equal(a, b)))

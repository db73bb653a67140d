"""The policy losses, their KL term, and sums that do not care how a step is cut into micro-batches.

Invariants
- A log-probability is taken at the temperature the tokens were sampled with (law 2).
- For every mode of `aggregate`, the sum over any split of a step's sequences into micro-batches equals the
  value of the whole step, and so do the gradients: the divisor is the step's, never the micro-batch's.
- Masked positions add nothing, whatever finite or non-finite value they hold.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

PolicyLoss = Literal["ppo_clip", "gspo", "cispo"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KlEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before `exp`, as in verl: e^20 is still far from overflow in float32."""
MAX_LOG_SEQUENCE_RATIO = 10.0
"""GSPO's length-normalised log-ratio is cut here from above, as in verl."""
MAX_K3 = 10.0
"""Largest k3 value of one token, as in verl."""


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution softmax(logits / temperature), in nats.

    logits: [..., V] any float type; targets: [...] int64. Returns (logp [...], entropy [...]), float64 for
    float64 logits and float32 otherwise. The entropy is a metric and carries no gradient: that would keep a
    second [..., V] tensor alive until the backward pass. Raises ValueError when the temperature is not
    positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed: above 0 (greedy samples have no gradient)")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)
    logp = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
    return logp, entropy


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float,
    num_tokens_total: int | None = None,
    kind: PolicyLoss = "ppo_clip",
) -> tuple[Tensor, dict[str, Tensor]]:
    """A policy loss per token.

    ppo_clip: PPO's clipped loss (arXiv 1707.06347, equation 7), with two refinements. The upper clip has its own
    width (clip-higher: DAPO, arXiv 2503.14476, equation 10); the loss of a negative advantage is at most
    `dual_clip * |A|` (dual clip: arXiv 1912.09729, equation 5).
    gspo: the same clip on the ratio of whole sequences, taken to the power 1 / length, with the gradient of each
    token (GSPO-token, arXiv 2507.18071, equations 7, 13 and 14). Rows are sequences. No dual clip.
    cispo: REINFORCE weighted by the clipped ratio, which carries no gradient, so that no token loses its gradient to
    the clip (MiniMax-M1, arXiv 2506.13585, equations 4 and 5). No dual clip.

    logp, old_logp, mask: [B, L]; advantages: [B, L] or [B, 1]; mask: 1 or true where a token counts. old_logp is what
    the ratio is taken against: the behaviour policy, or the proximal one of decoupled PPO (arXiv 2110.00641),
    whose importance weight `trainer.correction` gives.
    Returns the loss per token [B, L], to be given to `aggregate`, and detached metrics as scalar tensors
    with verl's meanings: actor/pg_clipfrac (share of tokens the clip changed), actor/pg_clipfrac_lower
    (share the dual clip changed) and actor/ppo_kl (mean of old_logp - logp). Each is a mean over the masked
    tokens; with `num_tokens_total`, the token count of the whole step, the values of the micro-batches add
    up to the step's.
    """
    log_ratio = logp - old_logp
    if kind != "gspo":
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    low, high = 1 - clip_ratio_low, 1 + clip_ratio_high
    lower_clipped = torch.zeros((), dtype=torch.bool, device=logp.device).expand_as(logp)
    match kind:
        case "ppo_clip":
            losses, clipped, lower_clipped = _ppo_clip(log_ratio.exp(), advantages, low, high, dual_clip)
        case "gspo":
            losses, clipped = _pessimistic(_sequence_ratio(logp, log_ratio, mask), advantages, low, high)
        case "cispo":
            ratio = log_ratio.exp()
            weight = ratio.clamp(low, high).detach()
            losses, clipped = -weight * advantages * logp, ratio != weight
        case _:
            raise ValueError(f"kind is {kind!r}; allowed: {', '.join(get_args(PolicyLoss))}")
    with torch.no_grad():
        divisor = mask.sum().clamp(min=1) if num_tokens_total is None else num_tokens_total
        per_token = {
            "actor/pg_clipfrac": clipped.to(losses.dtype),
            "actor/pg_clipfrac_lower": lower_clipped.to(losses.dtype),
            "actor/ppo_kl": -log_ratio,
        }
        metrics = {name: _masked(values, mask).sum() / divisor for name, values in per_token.items()}
    return losses, metrics


def _pessimistic(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO's larger of the two losses, and where the clip decided."""
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(low, high)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def _ppo_clip(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; allowed: above 1")
    pessimistic, clipped = _pessimistic(ratio, advantages, low, high)
    ceiling, negative = -advantages * dual_clip, advantages < 0
    losses = torch.where(negative, torch.minimum(ceiling, pessimistic), pessimistic)
    return losses, clipped, (pessimistic > ceiling) & negative


def _sequence_ratio(logp: Tensor, log_ratio: Tensor, mask: Tensor) -> Tensor:
    """[B, L]: every token has its sequence's geometric mean ratio as value and its own log-probability's gradient."""
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    of_sequence = _masked(log_ratio, mask).sum(-1, keepdim=True) / lengths
    return (logp - logp.detach() + of_sequence.detach()).clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()


def kl_penalty(logp: Tensor, ref_logp: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from one sampled token, same shape as logp.

    With r = exp(ref_logp - logp): k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r (Schulman,
    "Approximating KL divergence", 2020). k3 is GRPO's (arXiv 2402.03300, equation 4), cut at 10 as in verl.
    Mind the trap when it is used as a loss: the gradient of k1 has mean 0 over the policy's own samples;
    only k2's is that of the KL.
    """
    log_ratio = ref_logp - logp
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return 0.5 * log_ratio.square()
        case "k3":
            log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return (log_ratio.exp() - log_ratio - 1).clamp(-MAX_K3, MAX_K3)
    raise ValueError(f"estimator is {estimator!r}; allowed: {', '.join(get_args(KlEstimator))}")


def aggregate(
    loss: Tensor,
    mask: Tensor,
    mode: Aggregation,
    num_tokens_total: int,
    num_sequences_total: int,
    horizon: int | None = None,
) -> Tensor:
    """This micro-batch's share of the step's loss; the shares of all micro-batches add up to the step's loss.

    token-mean: sum over tokens / tokens of the step. seq-mean-token-sum: sum over tokens / sequences of the
    step. seq-mean-token-mean: sum over sequences of their token mean / sequences of the step.
    seq-mean-token-sum-norm: sum over tokens / (sequences of the step * `horizon`), a constant, so that a long response
    is not favoured (Dr. GRPO, arXiv 2503.20783, section 3.1 and listing 1).

    loss, mask: [B, L], one sequence a row. num_tokens_total, num_sequences_total: masked tokens, and
    sequences with at least one of them, in all that one optimiser update is made from. horizon: tokens, only for the
    last mode. Raises ValueError for an unknown mode or a total below 1: a step with no token has no mean, and the
    caller must skip it.
    """
    if num_tokens_total < 1 or num_sequences_total < 1:
        raise ValueError(
            f"num_tokens_total={num_tokens_total}, num_sequences_total={num_sequences_total}; allowed: at least 1"
        )
    per_sequence = _masked(loss, mask).sum(-1)
    match mode:
        case "token-mean":
            return per_sequence.sum() / num_tokens_total
        case "seq-mean-token-sum":
            return per_sequence.sum() / num_sequences_total
        case "seq-mean-token-mean":
            # A row without tokens has sum 0: the clamp keeps its mean at 0 instead of 0 / 0.
            return (per_sequence / mask.sum(-1).clamp(min=1)).sum() / num_sequences_total
        case "seq-mean-token-sum-norm":
            if horizon is None or horizon < 1:
                raise ValueError(f"horizon is {horizon}; mode {mode} needs a number of tokens, at least 1")
            return per_sequence.sum() / (num_sequences_total * horizon)
    raise ValueError(f"mode is {mode!r}; allowed: {', '.join(get_args(Aggregation))}")


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with 0 where the mask is off; a product would keep NaN and infinity of padding alive."""
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))

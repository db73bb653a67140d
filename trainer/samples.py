"""Prompts to requests, rollouts to scored samples, samples to metrics and records.

Invariants: uids and noise depend on (run seed, step, group, sample) only; a sample that cannot be used is counted
with its reason and left out of the loss, and the job goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slipstream.drafter.base import SOURCE_NAMES, HistoryRecord
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid
from slipstream.trainer.advantages import Advantage, GroupCounts, compute_advantages
from slipstream.trainer.batch import TrainSample
from slipstream.trainer.data.prompts import Prompt
from slipstream.trainer.data.rewards import RewardScorer, Score
from slipstream.trainer.data.tokenizer import ChatTokenizer

COUNTS = {"das/guard_switched_off", "das/guard_retries", "das/guard_held_out_steps"}


@dataclass(frozen=True, slots=True)
class ScoredStep:
    """The samples of one step: rewards and advantages [N], NaN reward and advantage 0 where left out; reasons counts
    why samples were left out. prompts: by Request.group. untrained: rollouts of dropped groups, with their rewards."""

    prompts: Mapping[int, Prompt]
    rollouts: list[Rollout]
    rewards: np.ndarray
    advantages: np.ndarray
    counts: GroupCounts
    reasons: Counter[str]
    untrained: list[tuple[Rollout, float]] = field(default_factory=list)

    def train_samples(self) -> list[TrainSample]:
        """What the learner gets: every sample that has a reward."""
        return [
            TrainSample(r.request.prompt, r.tokens, r.logprobs, float(advantage))
            for r, reward, advantage in zip(self.rollouts, self.rewards, self.advantages, strict=True)
            if np.isfinite(reward)
        ]

    def history(self, step: int) -> list[HistoryRecord]:
        """What drafters remember: every response that ended by itself or at its limit."""
        return [
            HistoryRecord(
                r.request.prompt_id,
                step,
                r.request.uid,
                r.tokens,
                reward=float(reward),
                version=int(r.policy_versions[-1]) if len(r.policy_versions) else -1,
                censored=r.finish == "length",
            )
            for r, reward in [*zip(self.rollouts, self.rewards, strict=True), *self.untrained]
            if r.finish in ("stop", "length")
        ]


def make_requests(prompts: Sequence[Prompt], step: int, num_samples: int, sampling: Sampling) -> list[Request]:
    """The requests of one step: group i is prompt i, with `num_samples` samples."""
    return [
        request
        for group, prompt in enumerate(prompts)
        for request in group_requests(prompt, step, group, num_samples, sampling, group)
    ]


def group_requests(
    prompt: Prompt, step: int, place: int, num_samples: int, sampling: Sampling, group: int
) -> list[Request]:
    """One group: the samples of place `place` of step `step`, labelled `group`."""
    return [
        Request(request_uid(sampling.seed, step, place, sample), prompt.prompt_id, group, prompt.tokens, sampling)
        for sample in range(num_samples)
    ]


def score_rollout(prompt: Prompt, rollout: Rollout, scorer: RewardScorer, tokenizer: ChatTokenizer) -> Score:
    """The reward of one rollout, or why it has none."""
    if rollout.finish in ("abort", "error"):
        return Score(None, rollout.error or "aborted")
    return scorer.score(prompt, response_text(rollout, tokenizer))


def response_text(rollout: Rollout, tokenizer: ChatTokenizer) -> str:
    """The response without its stop token."""
    ended = rollout.finish == "stop" and rollout.tokens[-1] in rollout.request.sampling.stop_token_ids
    return tokenizer.decode((rollout.tokens[:-1] if ended else rollout.tokens).tolist())


def scored_step(
    prompts: Mapping[int, Prompt], rollouts: list[Rollout], scores: Sequence[Score], advantage: Advantage
) -> ScoredStep:
    """Group advantages of scored rollouts. prompts: by Request.group."""
    rewards = np.array([np.nan if score.value is None else score.value for score in scores], np.float64)
    reasons = Counter(score.error for score in scores if score.value is None)
    groups = np.array([rollout.request.group for rollout in rollouts])
    lengths = np.array([len(rollout.tokens) for rollout in rollouts])
    advantages, counts = compute_advantages(advantage, rewards, groups, lengths)
    return ScoredStep(prompts, rollouts, rewards, advantages, counts, reasons)


def staleness_metrics(rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
    """How many updates the samples of step `step` lag behind the policy it starts from, under verl's names.

    trajectory_spans: versions a rollout was sampled by (1: a single one); trajectory_staleness: lag of its newest
    token; trajectory_staleness_worst: lag of its oldest.
    """
    versions = [r.policy_versions for r in rollouts if len(r.policy_versions)]
    if not versions:
        return {}
    newest = np.array([int(v.max()) for v in versions])
    oldest = np.array([int(v.min()) for v in versions])
    values = {
        "trajectory_spans": newest - oldest + 1,
        "trajectory_staleness": (step - 1) - newest,
        "trajectory_staleness_worst": (step - 1) - oldest,
    }
    return {
        f"training/off_policy/{name}/{statistic}": float(getattr(value, statistic)())
        for name, value in values.items()
        for statistic in ("mean", "max", "min")
    }


def sample_metrics(scored: ScoredStep, max_new_tokens: int) -> dict[str, float]:
    """Rewards, lengths and what was left out, under verl's names."""
    lengths = np.array([len(r.tokens) for r in scored.rollouts if r.finish in ("stop", "length")])
    rewards = scored.rewards[np.isfinite(scored.rewards)]
    out: dict[str, float] = {
        "das/samples_left_out": float(scored.counts.num_left_out),
        "critic/groups_uniform": float(scored.counts.num_uniform),
    }
    for name, values in (("critic/rewards", rewards), ("critic/advantages", scored.advantages)):
        if len(values):
            out |= {f"{name}/mean": values.mean(), f"{name}/max": values.max(), f"{name}/min": values.min()}
    if len(lengths):
        out |= {
            "response_length/mean": lengths.mean(),
            "response_length/max": lengths.max(),
            "response_length/min": lengths.min(),
            "response_length/clip_ratio": float(np.mean([r.finish == "length" for r in scored.rollouts])),
        }
    prompt_lengths = np.array([len(r.request.prompt) for r in scored.rollouts])
    out |= {"prompt_length/mean": prompt_lengths.mean(), "prompt_length/max": prompt_lengths.max()}
    return {name: float(value) for name, value in out.items()}


def speculation_metrics(rollouts: Sequence[Rollout], stats: Sequence[EngineStats]) -> dict[str, float]:
    """Acceptance under verl's names and per source, and where the engines' time went.

    rollout/spec_accept_rate: mean over requests of accepted / drafted; rollout/spec_accept_length: mean of
    1 + accepted / rounds; das/accepted_per_round: accepted draft tokens per forward round, over all requests.
    """
    rounds = sum(r.spec.rounds for r in rollouts)
    drafted, accepted = sum(r.spec.drafted for r in rollouts), sum(r.spec.accepted for r in rollouts)
    out = {
        "das/drafted": float(drafted),
        "das/accepted": float(accepted),
        "das/accepted_per_round": accepted / rounds if rounds else 0.0,
        "das/invalid_drafts": float(sum(s.invalid_drafts for s in stats)),
        "das/shared_prompt_tokens": float(sum(s.shared_prompt_tokens for s in stats)),
        "das/copied_prompt_tokens": float(sum(s.copied_prompt_tokens for s in stats)),
        "das/engine_steps": float(max((s.steps for s in stats), default=0)),
        "rollout/spec_accept_length": float(np.mean([1 + r.spec.accepted / max(1, r.spec.rounds) for r in rollouts])),
    }
    rates = [r.spec.accepted / r.spec.drafted for r in rollouts if r.spec.drafted]
    if rates:
        out["rollout/spec_accept_rate"] = float(np.mean(rates))
    sources: Counter[str] = Counter()
    for rollout in rollouts:
        sources.update(rollout.spec.by_source)
    out |= {f"das/accepted_{name}": float(sources[name]) for name in SOURCE_NAMES[1:]}
    total = sum(s.total_s for s in stats) or 1.0
    for part in ("forward_s", "sample_s", "draft_s", "other_s"):
        out[f"das/engine_share_{part[:-2]}"] = sum(getattr(s, part) for s in stats) / total
    return out


def pricing_metrics(of_workers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the workers measured of lengths, costs and gains: counts are added, all else is their mean."""
    out: dict[str, float] = {}
    for name in sorted({name for metrics in of_workers for name in metrics}):
        values = [metrics[name] for metrics in of_workers if name in metrics]
        out[name] = float(np.sum(values) if name in COUNTS else np.mean(values))
    return out


def rollout_records(scored: ScoredStep, step: int, num_samples: int) -> list[dict[str, Any]]:
    """One JSON object per rollout: what a replay or a reader of the run needs."""
    records = []
    for i, rollout in enumerate(scored.rollouts):
        reward, request = scored.rewards[i], rollout.request
        records.append(
            {
                "step": step,
                "uid": request.uid,
                "prompt_id": request.prompt_id,
                "group": request.group,
                "sample": i % num_samples,
                "level": scored.prompts[request.group].level,
                "num_tokens": len(rollout.tokens),
                "tokens": rollout.tokens.tolist(),
                "reward": float(reward) if np.isfinite(reward) else None,
                "finish": rollout.finish,
                "error": rollout.error,
                "policy_version": int(rollout.policy_versions[-1]) if len(rollout.policy_versions) else None,
                "spec": {
                    "rounds": rollout.spec.rounds,
                    "drafted": rollout.spec.drafted,
                    "accepted": rollout.spec.accepted,
                    "by_source": rollout.spec.by_source,
                },
            }
        )
    return records

"""Validation in the loop: held-out prompts through the same workers, under verl's val-core and val-aux names.

Invariants
- A validation uid never equals a training uid (its step is negative), and depends on (run seed, step, prompt, sample).
- Nothing waits here: rollouts are delivered, and metrics come out once an evaluation is complete, with the versions
  that sampled it; a sample without a reward counts as 0 and is counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np

from slipstream.conf.schema import EvaluationConfig
from slipstream.rollout.types import Request, Rollout, Sampling
from slipstream.trainer.data.prompts import Prompt
from slipstream.trainer.data.rewards import RewardScorer, final_part, normalize_answer
from slipstream.trainer.data.tokenizer import ChatTokenizer
from slipstream.trainer.samples import group_requests, response_text, score_rollout


@dataclass(slots=True)
class _Open:
    """One evaluation under way. answers: by place of the prompt, (sample, reward, what it answered)."""

    missing: set[int]
    answers: dict[int, list[tuple[int, float, str]]]
    versions: list[int]
    num_unscored: int = 0


class Evaluation:
    """The validation set of a job, and the evaluations of it that are under way."""

    def __init__(
        self,
        config: EvaluationConfig,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        scorer: RewardScorer,
        tokenizer: ChatTokenizer,
    ) -> None:
        self._prompts = list(prompts)[: config.max_prompts]
        self._num_samples = config.num_samples_per_prompt
        self._sampling = replace(sampling, temperature=config.temperature)
        self._scorer, self._tokenizer = scorer, tokenizer
        self._open: dict[int, _Open] = {}
        self._step_of: dict[int, int] = {}
        self._ended: dict[str, float] = {}

    @property
    def num_open(self) -> int:
        """Evaluations that wait for rollouts."""
        return len(self._open)

    def start(self, step: int) -> list[Request]:
        """The requests that evaluate version `step`; group: the prompt's place in the validation set."""
        requests = [
            request
            for place, prompt in enumerate(self._prompts)
            for request in group_requests(prompt, -1 - step, place, self._num_samples, self._sampling, place)
        ]
        uids = {request.uid for request in requests}
        self._open[step] = _Open(uids, defaultdict(list), [])
        self._step_of.update(dict.fromkeys(uids, step))
        return requests

    def deliver(self, rollout: Rollout) -> bool:
        """Takes a rollout; false when it belongs to no evaluation."""
        step = self._step_of.pop(rollout.request.uid, None)
        if step is None:
            return False
        run, place = self._open[step], rollout.request.group
        score = score_rollout(self._prompts[place], rollout, self._scorer, self._tokenizer)
        run.num_unscored += score.value is None
        answer = normalize_answer(final_part(response_text(rollout, self._tokenizer)))
        # Samples arrive in any order; the vote breaks ties by this one.
        run.answers[place].append((rollout.request.uid, score.value or 0.0, answer))
        run.versions += rollout.policy_versions.tolist()
        run.missing.discard(rollout.request.uid)
        if not run.missing:
            self._ended |= self._metrics(step, self._open.pop(step))
        return True

    def ended(self) -> dict[str, float]:
        """Metrics of the evaluations that have ended since the last call; the newest where there are several."""
        out, self._ended = self._ended, {}
        return out

    def _metrics(self, step: int, run: _Open) -> dict[str, float]:
        by_source: dict[str, list[list[tuple[int, float, str]]]] = defaultdict(list)
        for place, answers in run.answers.items():
            by_source[self._prompts[place].data_source].append(sorted(answers))
        out = {
            "val-aux/step": float(step),
            "val-aux/num_unscored": float(run.num_unscored),
            "val-aux/policy_version/min": float(min(run.versions, default=step)),
            "val-aux/policy_version/max": float(max(run.versions, default=step)),
        }
        for source, prompts in by_source.items():
            rewards = [[reward for _, reward, _ in answers] for answers in prompts]
            votes = [[answer for _, _, answer in answers] for answers in prompts]
            out |= validation_metrics(source, rewards, votes)
        return out


def validation_metrics(
    source: str, rewards: Sequence[Sequence[float]], answers: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Means over the prompts of one data source. rewards, answers: one list of n samples for each prompt.

    mean@n; std@n; for k = 2, 4, ... and n: best@k/mean, see `best_of`, and worst@k/mean; maj@n/mean, see `majority`.
    Of these mean, best and maj at n are val-core, the others val-aux, as in verl.
    """
    num = len(rewards[0])
    values = {f"mean@{num}": float(np.mean([np.mean(of_prompt) for of_prompt in rewards]))}
    if num > 1:
        values[f"std@{num}"] = float(np.mean([np.std(of_prompt) for of_prompt in rewards]))
        values[f"maj@{num}/mean"] = float(np.mean([majority(r, a) for r, a in zip(rewards, answers, strict=True)]))
        sizes = [2**i for i in range(1, num.bit_length()) if 2**i < num] + [num]
        for k in sizes:
            values[f"best@{k}/mean"] = float(np.mean([best_of(of_prompt, k) for of_prompt in rewards]))
            negated = [[-reward for reward in of_prompt] for of_prompt in rewards]
            values[f"worst@{k}/mean"] = -float(np.mean([best_of(of_prompt, k) for of_prompt in negated]))
    out = {}
    for name, value in values.items():
        core = name.startswith(("mean", "best", "maj")) and name.partition("/")[0].endswith(f"@{num}")
        out[f"{'val-core' if core else 'val-aux'}/{source}/reward/{name}"] = value
    return out


def best_of(rewards: Sequence[float], k: int) -> float:
    """Expected best of k samples drawn without replacement from these n: unbiased for k fresh samples.

    The i-th smallest of n is the best of a subset of size k in C(i - 1, k - 1) of C(n, k) cases. For rewards of 0 and 1
    this is pass@k (Chen et al., arXiv 2107.03374, equation 1). ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= len(rewards):
        raise ValueError(f"k is {k} for {len(rewards)} samples; allowed: 1 to {len(rewards)}")
    ways = [comb(i, k - 1) for i in range(len(rewards))]
    return float(np.dot(sorted(rewards), ways)) / comb(len(rewards), k)


def majority(rewards: Sequence[float], answers: Sequence[str]) -> float:
    """The reward of the most frequent answer; among equally frequent ones of the first (maj@n: Wang et al., arXiv
    2203.11171, self-consistency)."""
    vote = Counter(answers).most_common(1)[0][0]
    return rewards[list(answers).index(vote)]

"""Where the samples of a step come from: the protocol, and the synchronous source.

Invariants
- `collect(step)` returns whole groups, scored, none of them ever returned before.
- The synchronous source samples step s with the weights of version s - 1 and nothing else: its tokens are a pure
  function of those weights, the run seed and the prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slipstream.conf.schema import Settings
from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.actors import PoolError
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.learned import Learned, Observed
from slipstream.rollout.pool import RolloutPool
from slipstream.rollout.types import Rollout, Sampling
from slipstream.rollout.weight_handle import ComingHandle
from slipstream.trainer.data.prompts import PromptOrder, PromptSet
from slipstream.trainer.data.rewards import RewardScorer
from slipstream.trainer.data.tokenizer import ChatTokenizer
from slipstream.trainer.evaluation import Evaluation
from slipstream.trainer.job_state import JobState
from slipstream.trainer.learner_group import LearnerCall
from slipstream.trainer.samples import ScoredStep, make_requests, score_rollout, scored_step
from slipstream.trainer.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class Collected:
    """The samples of a step. stats, observed: one per worker, since the last step; gen_s: what perf/throughput
    divides by; epoch: of the prompts; metrics: the source's own, timings included."""

    scored: ScoredStep
    stats: list[EngineStats]
    observed: list[Observed]
    gen_s: float
    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What both sources work with."""

    settings: Settings
    prompts: PromptSet
    order: PromptOrder
    sampling: Sampling
    scorer: RewardScorer
    tokenizer: ChatTokenizer
    state: JobState
    watchdog: Watchdog


class RolloutSource(Protocol):
    """Collects samples, and keeps the workers up to date. Every call waits for a bounded time."""

    def collect(self, step: int) -> Collected:
        """The samples that step `step` trains on."""

    def wait(self, call: LearnerCall) -> Any:
        """The answer of the learners."""

    def publish_weights(self, handle: ComingHandle) -> dict[str, float]:
        """Brings a version of the weights to every worker; metrics of the transfer."""

    def publish_history(self, step: int, records: list[HistoryRecord], learned: Learned) -> None:
        """Rolls the drafters' windows."""

    def evaluate(self, evaluation: Evaluation, step: int) -> dict[str, float]:
        """Starts the evaluation of version `step`; metrics of those that have ended."""

    def finish(self) -> dict[str, float]:
        """The job's last step is over: metrics of what was still open."""

    def describe(self) -> str:
        """What is queued and in flight, for a stall's report."""

    def position(self) -> tuple[int, list[int]]:
        """(first group never started, groups started and not done with) for the checkpoint."""


def check_on_policy(rollouts: Sequence[Rollout], version: int) -> None:
    """PoolError naming a rollout with tokens of another version: their log-probabilities would pass for this one's."""
    stale = [rollout for rollout in rollouts if (rollout.policy_versions != version).any()]
    if stale:
        raise PoolError(
            f"{len(stale)} rollouts hold tokens of another version than {version}, the first one "
            f"(uid {stale[0].request.uid}) of {sorted(set(stale[0].policy_versions.tolist()))}"
        )


class SyncSource:
    """Step by step: all groups of a step start together and end before it is trained on."""

    def __init__(self, pool: RolloutPool, context: SourceContext) -> None:
        self._pool, self._context = pool, context
        self._cluster = context.settings.cluster
        self._version = 0

    def collect(self, step: int) -> Collected:
        """Generates, then scores."""
        context, algo = self._context, self._context.settings.algo
        prompts = [context.prompts.train[i] for i in context.order.indices(step)]
        num_samples = context.settings.sampling.num_samples_per_prompt
        requests = make_requests(prompts, step, num_samples, context.sampling)
        started = time.perf_counter()
        result = self._pool.generate(requests, context.state.predicted_lengths, self._cluster.rollout_timeout_s)
        generated = time.perf_counter()
        context.watchdog.progress(f"{len(result.rollouts)} rollouts of step {step}")
        check_on_policy(result.rollouts, self._version)
        scores = [
            score_rollout(prompts[rollout.request.group], rollout, context.scorer, context.tokenizer)
            for rollout in result.rollouts
        ]
        scored = scored_step(dict(enumerate(prompts)), result.rollouts, scores, algo.advantage)
        metrics = {
            "timing_s/gen": generated - started,
            "timing_s/reward": time.perf_counter() - generated,
            "perf/worker_idle_share": _idle_share(result.busy_s),
            "das/stolen_requests": float(result.num_stolen),
        }
        epoch = context.order.epoch(step)
        return Collected(scored, result.stats, result.observed, generated - started, epoch, metrics)

    def replay(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The same requests once more with drafting off, under the same weights."""
        requests = [rollout.request for rollout in rollouts]
        predicted, timeout_s = self._context.state.predicted_lengths, self._cluster.rollout_timeout_s
        return self._pool.generate(requests, predicted, timeout_s, speculate=False).rollouts

    def wait(self, call: LearnerCall) -> Any:
        """Waits; workers that die meanwhile are replaced."""
        while (left_s := call.deadline - time.monotonic()) > 0.0 and (pending := call.pending()):
            self._pool.wait_beside(pending, left_s)
        return call.result()

    def publish_weights(self, handle: ComingHandle) -> dict[str, float]:
        """All workers serve the handle's version afterwards."""
        update = self._pool.update_policy(handle, self._cluster.update_timeout_s)
        self._version = update.handle.version
        return update.metrics()

    def publish_history(self, step: int, records: list[HistoryRecord], learned: Learned) -> None:
        """All drafters have rolled afterwards."""
        self._pool.publish(step, records, learned, self._cluster.rollout_timeout_s)

    def evaluate(self, evaluation: Evaluation, step: int) -> dict[str, float]:
        """Generates, scores, returns."""
        requests = evaluation.start(step)
        result = self._pool.generate(requests, {}, self._cluster.rollout_timeout_s)
        for rollout in result.rollouts:
            evaluation.deliver(rollout)
        return evaluation.ended()

    def finish(self) -> dict[str, float]:
        """Nothing is ever open."""
        return {}

    def describe(self) -> str:
        """Steps are all or nothing: there is no more to say than the step."""
        return f"source: synchronous, step {self._context.state.step + 1}"

    def position(self) -> tuple[int, list[int]]:
        """Steps end with nothing in flight."""
        return self._context.state.step * self._context.settings.algo.num_prompts_per_step, []


def _idle_share(busy_s: list[float]) -> float:
    """Of the time until the last worker was done; 0 where everybody who worked has died since."""
    longest_s = max(busy_s, default=0.0)
    return 1.0 - sum(busy_s) / (longest_s * len(busy_s)) if longest_s else 0.0

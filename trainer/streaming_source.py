"""The source of an asynchronous job: generation runs ahead, within the bound of the work buffer.

Invariants
- Group g of the job is place g mod n of step g // n + 1: its uids, noise and prompt are those of the synchronous job,
  whichever step trains on it.
- Every admitted group is trained on, dropped, closed or still here, and counted as such in the metrics of every step.
- Whatever the loop waits for, finished rollouts are scored and free slots are filled meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.actors import PoolTimeout
from slipstream.rollout.learned import Learned
from slipstream.rollout.streaming_pool import StreamingPool
from slipstream.rollout.types import Rollout
from slipstream.rollout.weight_handle import ComingHandle
from slipstream.trainer.advantages import uniform_groups
from slipstream.trainer.data.prompts import Prompt
from slipstream.trainer.data.rewards import Score
from slipstream.trainer.evaluation import Evaluation
from slipstream.trainer.learner_group import LearnerCall
from slipstream.trainer.rollout_source import Collected, SourceContext
from slipstream.trainer.samples import group_requests, score_rollout, scored_step, staleness_metrics
from slipstream.trainer.work_buffer import Batch, Group, WorkBuffer

POLL_S = 1.0
"""Longest time between two looks at deadlines."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A rollout and its score."""

    rollout: Rollout
    score: Score


class StreamingSource:
    """Keeps the workers busy and hands out batches as the buffer allows."""

    def __init__(self, pool: StreamingPool, context: SourceContext) -> None:
        self._pool, self._context, state = pool, context, context.state
        self._algo, self._cluster = context.settings.algo, context.settings.cluster
        self._buffer: WorkBuffer[Sample] = WorkBuffer(
            self._algo.num_prompts_per_step,
            self._algo.max_staleness_steps,
            self._algo.num_steps,
            self._algo.num_extra_groups,
            version=state.step,
        )
        self._again, self._next = deque(state.outstanding_groups), state.next_group
        self._prompt_of: dict[int, Prompt] = {}
        self._untrained: list[tuple[Rollout, float]] = []
        self._refills = 0
        self._evaluation: Evaluation | None = None
        self._collected_at = time.perf_counter()
        self._reward_s = 0.0

    # ---- keeping busy

    def _admit(self) -> None:
        requests = []
        for _ in range(self._buffer.num_free):
            number = self._again.popleft() if self._again else self._next
            self._next = max(self._next, number + 1)
            step, place = number // self._algo.num_prompts_per_step + 1, number % self._algo.num_prompts_per_step
            prompt = self._context.prompts.train[self._context.order.at(number)]
            num_samples = self._context.settings.sampling.num_samples_per_prompt
            group = group_requests(prompt, step, place, num_samples, self._context.sampling, number)
            self._buffer.admit(number, [request.uid for request in group])
            self._prompt_of[number] = prompt
            requests += group
        if requests:
            self._pool.submit(requests, self._context.state.predicted_lengths)

    def _pump(self, wait_s: float, other: tuple[Any, ...] = ()) -> int:
        """Fills free slots, takes in what finished; how many rollouts that were."""
        self._admit()
        rollouts = self._pool.poll(wait_s, other)
        for rollout in rollouts:
            if self._evaluation is None or not self._evaluation.deliver(rollout):
                self._deliver(rollout)
        if rollouts:
            self._context.watchdog.progress(f"{len(rollouts)} rollouts")
        return len(rollouts)

    def _deliver(self, rollout: Rollout) -> None:
        started = time.perf_counter()
        prompt = self._prompt_of.get(rollout.request.group)
        if prompt is None:
            score = Score(None, "its group has left")
        else:
            score = score_rollout(prompt, rollout, self._context.scorer, self._context.tokenizer)
        self._reward_s += time.perf_counter() - started
        group = self._buffer.finish(rollout.request.uid, Sample(rollout, score))
        if group is not None and self._algo.filter_uniform_groups:
            self._drop_uniform(group)

    def _drop_uniform(self, group: Group[Sample]) -> None:
        samples = [group.results[uid] for uid in group.uids]
        rewards = np.array([np.nan if s.score.value is None else s.score.value for s in samples])
        limit = self._algo.max_refill_rounds * self._algo.num_prompts_per_step
        if self._refills < limit and uniform_groups(rewards, np.zeros(len(rewards), np.int64)):
            self._refills += 1
            self._buffer.drop(group.number, "uniform")
            self._untrained += [(s.rollout, float(reward)) for s, reward in zip(samples, rewards, strict=True)]

    # ---- the loop's calls

    def collect(self, step: int) -> Collected:
        """Waits for the buffer's next batch."""
        started = time.perf_counter()
        batch = self._next_batch(step)
        self._pool.abort(uid for group in batch.closed for uid in group.uids if uid not in group.results)
        samples = [group.results[uid] for group in batch.groups for uid in group.uids]
        rollouts = [sample.rollout for sample in samples]
        prompts = {group.number: self._prompt_of[group.number] for group in batch.groups}
        scored = scored_step(prompts, rollouts, [sample.score for sample in samples], self._algo.advantage)
        scored.untrained.extend(self._untrained)
        self._untrained, self._refills = [], 0
        here = set(self._buffer.outstanding())
        self._prompt_of = {number: prompt for number, prompt in self._prompt_of.items() if number in here}
        reports = self._pool.report()
        wall_s = sum(report.wall_s for report in reports)
        now = time.perf_counter()
        gen_s, self._collected_at = now - self._collected_at, now
        metrics = self._metrics(batch) | staleness_metrics(rollouts, step)
        metrics |= {
            "timing_s/gen": now - started,
            "timing_s/reward": self._reward_s,
            "perf/worker_idle_share": 1.0 - sum(report.busy_s for report in reports) / max(wall_s, 1e-9),
            "das/stolen_requests": float(self._pool.take_num_stolen()),
        }
        self._reward_s = 0.0
        epoch = max(group.number for group in batch.groups) // self._context.order.num_prompts
        return Collected(scored, [r.stats for r in reports], [r.observed for r in reports], gen_s, epoch, metrics)

    def _next_batch(self, step: int) -> Batch[Sample]:
        progressed = time.monotonic()
        while (batch := self._buffer.take()) is None:
            if self._pump(POLL_S):
                progressed = time.monotonic()
            elif time.monotonic() - progressed > self._cluster.rollout_timeout_s:
                raise PoolTimeout(
                    f"rollouts of step {step}: nothing finished for {self._cluster.rollout_timeout_s:g} s; waited for "
                    f"groups {self._buffer.waited_for()[:8]}, the workers hold {self._pool.num_in_flight} requests"
                )
        return batch

    def _metrics(self, batch: Batch[Sample]) -> dict[str, float]:
        counts, buffer = self._buffer.counts, self._buffer
        return {
            "async/groups_admitted": float(counts.admitted),
            "async/groups_trained": float(counts.trained),
            "async/groups_in_training": float(len(batch.groups)),
            "async/groups_closed": float(counts.closed),
            "async/groups_dropped_uniform": float(counts.dropped["uniform"]),
            "async/groups_open": float(len(buffer.outstanding()) - len(batch.groups)),
            "async/groups_complete": float(buffer.num_complete),
            "async/samples_late": float(counts.late),
            "async/requests_in_flight": float(sum(self._pool.num_in_flight.values())),
        }

    def wait(self, call: LearnerCall) -> Any:
        """Takes rollouts in and starts new ones until the answer is there."""
        while time.monotonic() < call.deadline and (pending := call.pending()):
            self._pump(POLL_S, pending)
        return call.result()

    def publish_weights(self, handle: ComingHandle) -> dict[str, float]:
        """Swaps the weights; the slots of the step that made them are free afterwards."""
        update = self._pool.swap_policy(handle, self._algo.in_flight, self._cluster.update_timeout_s)
        if update.handle.version > self._buffer.version:
            self._buffer.publish()
            self._pump(0.0)
        return update.metrics()

    def publish_history(self, step: int, records: list[HistoryRecord], learned: Learned) -> None:
        """Rolls the windows between two engine steps."""
        self._pool.publish(step, records, learned, self._cluster.rollout_timeout_s)

    def evaluate(self, evaluation: Evaluation, step: int) -> dict[str, float]:
        """Queues the evaluation's requests behind those in flight; nobody waits for them."""
        self._evaluation = evaluation
        self._pool.submit(evaluation.start(step), {})
        return evaluation.ended()

    def finish(self) -> dict[str, float]:
        """Waits for evaluations; what else is in flight is taken out and counted."""
        self._pool.abort(self._buffer.in_flight())
        progressed = time.monotonic()
        while self._evaluation is not None and self._evaluation.num_open:
            if self._pump(POLL_S):
                progressed = time.monotonic()
            elif time.monotonic() - progressed > self._cluster.rollout_timeout_s:
                raise PoolTimeout(f"evaluation: nothing finished for {self._cluster.rollout_timeout_s:g} s")
        left = float(len(self._buffer.outstanding()))
        return {"async/groups_left": left} | (self._evaluation.ended() if self._evaluation else {})

    def describe(self) -> str:
        """Slots, queues and uids."""
        buffer = self._buffer
        return "\n".join(
            [
                f"source: version {buffer.version}, next step {buffer.next_step}, slots {buffer.capacity}, "
                f"free {buffer.num_free}, complete {buffer.num_complete}",
                f"groups waited for, in order of their due steps: {buffer.waited_for()}",
                f"requests in each worker: {self._pool.num_in_flight}",
                f"uids in flight: {buffer.in_flight()}",
            ]
        )

    def position(self) -> tuple[int, list[int]]:
        """What a resumed job starts with."""
        return self._next, sorted([*self._buffer.outstanding(), *self._again])

"""A job with a sleeping trainer on simulated workers: makespans of thousands of rollouts, without a model.

Invariants
- Admission, completion and the choice of batches are the job's own work buffer; only generation and training are
  simulated. Staleness 0 is the synchronous job, in the same code.
- Pure and deterministic: no clock, no thread; the lengths of a group are a function of (seed, group).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from slipstream.trainer.work_buffer import WorkBuffer


@dataclass(frozen=True, slots=True)
class Scene:
    """What is simulated.

    A decoding step of a worker takes step_s + token_s * (live requests) and gives each of them a token. Lengths are
    log-normal, cut at max_tokens: the long tail of reasoning tasks.
    """

    num_workers: int = 64
    slots_per_worker: int = 32
    groups_per_step: int = 256
    samples_per_group: int = 8
    step_s: float = 0.020
    token_s: float = 0.0003
    median_tokens: float = 2000.0
    sigma: float = 1.0
    max_tokens: int = 16384
    seed: int = 0

    def lengths(self, group: int) -> np.ndarray:
        """[samples_per_group] tokens of each response of a group."""
        rng = np.random.default_rng([self.seed, group])
        drawn = rng.lognormal(math.log(self.median_tokens), self.sigma, self.samples_per_group)
        return np.clip(drawn, 1, self.max_tokens).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Outcome:
    """wall_s for all steps; idle_share: of the workers' time without a live request; gen_s: mean time per step in which
    the trainer waited; staleness: mean and largest of the trained groups, in steps."""

    wall_s: float
    idle_share: float
    gen_s: float
    staleness_mean: float
    staleness_max: int


@dataclass(slots=True)
class SimulatedWorker:
    """Continuous batching as a flow: all live requests advance at 1 / (step_s + token_s * live) tokens per second.

    progress: tokens that a request which was live from the start would have by now.
    """

    scene: Scene
    now: float = 0.0
    progress: float = 0.0
    busy_s: float = 0.0
    live: list[tuple[float, int]] = field(default_factory=list)
    queue: deque[tuple[int, int]] = field(default_factory=deque)

    @property
    def num_held(self) -> int:
        """Requests queued and live."""
        return len(self.live) + len(self.queue)

    def _seconds_per_token(self) -> float:
        return self.scene.step_s + self.scene.token_s * len(self.live)

    def advance(self, now: float) -> None:
        """Lets time pass up to `now`, at most until the next request finishes."""
        if self.live:
            self.progress += (now - self.now) / self._seconds_per_token()
            self.busy_s += now - self.now
        self.now = now

    def next_finish(self) -> float:
        """When the next request finishes, infinity without one."""
        if not self.live:
            return math.inf
        return self.now + max(0.0, self.live[0][0] - self.progress) * self._seconds_per_token()

    def submit(self, uid: int, length: int) -> None:
        """Queues a request; `fill` starts it."""
        self.queue.append((uid, length))

    def fill(self) -> None:
        """Starts what is queued as long as slots are free."""
        while self.queue and len(self.live) < self.scene.slots_per_worker:
            uid, length = self.queue.popleft()
            heapq.heappush(self.live, (self.progress + length, uid))

    def finish(self) -> int:
        """The request that is due; its uid."""
        self.progress, uid = heapq.heappop(self.live)
        return uid


class Simulation:
    """One job of `num_steps` steps of training, train_s seconds each (update and weight transfer)."""

    def __init__(self, scene: Scene, max_staleness_steps: int, train_s: float, num_steps: int) -> None:
        self.scene, self._train_s, self._num_steps = scene, train_s, num_steps
        self._buffer: WorkBuffer[None] = WorkBuffer(scene.groups_per_step, max_staleness_steps, num_steps)
        self._workers = [SimulatedWorker(scene) for _ in range(scene.num_workers)]
        self._events: list[tuple[float, int, int]] = []
        self._stamp = [0] * scene.num_workers
        self._next_group = 0
        self._staleness: list[int] = []
        self._completed = False

    def run(self) -> Outcome:
        """Simulates to the end of the last step."""
        now = waiting_s = idle_from = 0.0
        training_until = math.inf
        self._admit(now)
        while self._buffer.version < self._num_steps:
            if training_until == math.inf and self._completed and self._take():
                training_until, waiting_s = now + self._train_s, waiting_s + now - idle_from
            if self._events and self._events[0][0] <= training_until:
                now = self._next_rollout()
            else:
                now, idle_from, training_until = training_until, training_until, math.inf
                self._buffer.publish()
                self._completed = True
                self._admit(now)
        for worker in self._workers:
            worker.advance(now)
        busy_s = sum(worker.busy_s for worker in self._workers)
        return Outcome(
            wall_s=now,
            idle_share=1.0 - busy_s / (now * len(self._workers)),
            gen_s=waiting_s / self._num_steps,
            staleness_mean=float(np.mean(self._staleness)),
            staleness_max=max(self._staleness),
        )

    def _take(self) -> bool:
        self._completed = False
        batch = self._buffer.take()
        if batch is None:
            return False
        self._staleness += [batch.step - 1 - group.version for group in batch.groups]
        return True

    def _admit(self, now: float) -> None:
        """Fills free slots; every sample goes to the worker that holds the fewest."""
        touched = set()
        held = [(worker.num_held, i) for i, worker in enumerate(self._workers)]
        heapq.heapify(held)
        for uid, length in self._new_requests():
            count, i = heapq.heappop(held)
            heapq.heappush(held, (count + 1, i))
            self._workers[i].submit(uid, length)
            touched.add(i)
        for i in touched:
            self._restart(i, now)

    def _new_requests(self) -> Iterator[tuple[int, int]]:
        while self._buffer.num_free:
            number, self._next_group = self._next_group, self._next_group + 1
            lengths = self.scene.lengths(number)
            uids = [number * len(lengths) + sample for sample in range(len(lengths))]
            self._buffer.admit(number, uids)
            yield from zip(uids, lengths.tolist(), strict=True)

    def _restart(self, i: int, now: float) -> None:
        """Worker i starts what it can, and its next event replaces the one foreseen before."""
        worker = self._workers[i]
        worker.advance(now)
        worker.fill()
        self._stamp[i] += 1
        if worker.live:
            heapq.heappush(self._events, (worker.next_finish(), i, self._stamp[i]))
        while self._events and self._events[0][2] != self._stamp[self._events[0][1]]:
            heapq.heappop(self._events)

    def _next_rollout(self) -> float:
        now, i, _ = heapq.heappop(self._events)
        self._workers[i].advance(now)
        # Only a complete group, or the end of a step, can bring the next batch about.
        self._completed |= self._buffer.finish(self._workers[i].finish(), None) is not None
        self._restart(i, now)
        return now

"""Who is in the pool: every worker with its state, its incarnation and what it may still cost.

Invariants
- A number is given out once; a worker that takes a dead one's place keeps the number and the name, and counts up the
  incarnation. Each incarnation is an object of its own: answers of an old one cannot be taken for a new one's.
- starting -> serving -> (leaving ->) gone, and nothing else: only one that serves is given requests, only one that
  serves or leaves holds any.
- Plain bookkeeping: no clock, no Ray; whoever changes it acts on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from slipstream.rollout.actors import PoolError
from slipstream.rollout.guard import GuardState

WorkerState = Literal["starting", "serving", "leaving", "gone"]


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Keys as in conf/schema.py, group cluster.

    max_worker_restarts: of each worker; 0: the first death ends the job. worker_timeout_s: a ping unanswered for so
    long means hung. worker_step_timeout_s: longest single engine step. start_timeout_s: until a worker that starts is
    given up and started again, and how long the pool waits when nobody serves. max_queued_per_worker: requests beyond
    its slots, None: as many as slots. max_deaths_per_request: a request that so many dying workers held ends the job.
    prompt_load_limit: routing `prompt`, times the mean load.
    """

    max_worker_restarts: int = 3
    worker_timeout_s: float = 60.0
    worker_step_timeout_s: float = 900.0
    start_timeout_s: float = 120.0
    max_queued_per_worker: int | None = None
    max_deaths_per_request: int = 3
    prompt_load_limit: float = 1.25


@dataclass(slots=True, eq=False)
class Worker:
    """One incarnation of one worker. handle: of its actor; node: Ray's id, "" until it has started; facts: what it
    reported about itself; guard: of its drafting, as last reported, None where none watches; folder: of shared indexes
    that it maps; known: publishes that it was told while it started."""

    number: int
    handle: Any
    incarnation: int = 0
    state: WorkerState = "starting"
    node: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    guard: GuardState | None = None
    folder: str = ""
    known: int = 0

    @property
    def name(self) -> str:
        """As errors and metrics call it."""
        return worker_name(self.number)


def worker_name(number: int) -> str:
    """The name of the worker with this number."""
    return f"rollout worker {number}"


def check_alike(worker: Worker, others: Iterable[Worker]) -> None:
    """PoolError where a worker's products have other bits than those of the others: it would sample other tokens."""
    for other in others:
        mine, theirs = (one.facts.get("products") for one in (worker, other))
        if theirs is not None and mine != theirs:
            raise PoolError(
                f"{worker.name} multiplies by {mine}, {other.name} by {theirs}, and a request would get other tokens "
                "from each; allowed: one for all, as engine.cpu_products=fma makes sure"
            )


class Roster:
    """The present incarnation of every worker, and counts over the pool's life."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._workers: dict[int, Worker] = {}
        self._next_number = 0
        self.num_restarts = self.num_deaths = self.num_hung = 0

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def next_number(self) -> int:
        """A number that nobody ever had."""
        self._next_number += 1
        return self._next_number - 1

    def join(self, worker: Worker) -> None:
        """A new worker, or a new incarnation of one that is gone."""
        self._workers[worker.number] = worker

    def serving(self) -> list[Worker]:
        """Those that take requests, by number."""
        return [worker for worker in self if worker.state == "serving"]

    def holding(self) -> list[Worker]:
        """Those that may hold requests, by number."""
        return [worker for worker in self if worker.state in ("serving", "leaving")]

    def starting(self) -> list[Worker]:
        """Those that are not there yet, by number."""
        return [worker for worker in self if worker.state == "starting"]

    def named(self, name: str) -> Worker:
        """PoolError with the names there are when nobody bears this one."""
        for worker in self:
            if worker.name == name:
                return worker
        raise PoolError(f"{name!r} is no worker of the pool; allowed: {', '.join(worker.name for worker in self)}")

    def leave(self, worker: Worker) -> None:
        """The worker is gone for good."""
        worker.state = "gone"
        self._workers.pop(worker.number, None)

    def died(self, worker: Worker, reason: str, hung: bool) -> bool:
        """Notes a death; whether the worker is to be started again.

        Raises PoolError when it has no restart left. One that was leaving anyway is not missed.
        """
        leaving = worker.state == "leaving"
        worker.state = "gone"
        self.num_deaths += 1
        self.num_hung += hung
        if leaving:
            self.leave(worker)
            return False
        if worker.incarnation >= self._max_restarts:
            times = f"for the {worker.incarnation + 1}. time, " if worker.incarnation else ""
            raise PoolError(
                f"an actor died ({worker.name}), {times}cluster.max_worker_restarts={self._max_restarts}: {reason}"
            )
        self.num_restarts += 1
        return True

    def metrics(self) -> dict[str, float]:
        """Totals since the pool's start, and who serves now."""
        return {
            "pool/workers": float(len(self.serving())),
            "pool/deaths": float(self.num_deaths),
            "pool/hung_workers": float(self.num_hung),
            "pool/restarts": float(self.num_restarts),
        }

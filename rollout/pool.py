"""The pool of rollout workers: Ray actors, routing, deadlines; workers die, join and leave, the batch goes on.

Invariants
- Every request handed to `generate` comes back exactly once, or PoolError says why not. Its tokens depend on neither
  how many workers there are nor which of them died on the way.
- A batch starts longest predicted first; a worker that runs out of requests takes what waits, then what others have
  queued.
- Every wait has a deadline, and the error names who was waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.actors import PoolError, PoolTimeout, dump_stacks, make_actor
from slipstream.rollout.briefing import Briefing
from slipstream.rollout.crew import LOOK_EVERY_S, Crew
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.flight import CALL_TIMEOUT_S, Flight
from slipstream.rollout.learned import Learned, Observed
from slipstream.rollout.placement import Placement
from slipstream.rollout.roster import PoolLimits
from slipstream.rollout.routing import Routing
from slipstream.rollout.streaming_worker import StreamingWorker, WorkerReport
from slipstream.rollout.types import Request, Rollout
from slipstream.rollout.weight_handle import ComingHandle, WeightHandle
from slipstream.rollout.weight_update import WeightUpdate
from slipstream.rollout.worker import WorkerSpec

MAX_CONCURRENCY = 8
"""Threads of an actor: one each for a poll, a call that waits for a step, and a few that were given up."""


@dataclass(frozen=True, slots=True)
class PoolResult:
    """Rollouts in the order of the requests; of each worker that still serves, the engine's totals, its busy seconds
    and what it observed. num_stolen: requests that an idle worker took from a loaded one."""

    rollouts: list[Rollout]
    stats: list[EngineStats]
    busy_s: list[float]
    observed: list[Observed]
    num_stolen: int = 0


class RolloutPool:
    """`num_workers` Ray actors with the same spec, more or fewer while it runs.

    placement: where they run, by their names; None leaves it to Ray. routing, steal: see Flight.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        num_workers: int,
        num_cpus: float,
        num_gpus: float,
        routing: Routing = "sample",
        steal: bool = True,
        limits: PoolLimits | None = None,
        placement: Placement | None = None,
    ) -> None:
        limits, actor = limits or PoolLimits(), make_actor(StreamingWorker, num_cpus, num_gpus, MAX_CONCURRENCY)

        def make(name: str) -> Any:
            return actor.options(**(placement.options(name) if placement else {})).remote(spec)

        self._flight = Flight(spec.max_live_requests, routing, steal, limits)
        self._crew = Crew(make, num_workers, limits, Briefing(spec.window_epochs), self._flight.requeue)

    # ---- start and end

    def ready(self, timeout_s: float) -> list[dict[str, Any]]:
        """Waits until every worker has loaded its model; what each reports about itself."""
        self._crew.settle("start", timeout_s)
        return [worker.facts for worker in self._crew.roster]

    def share_indexes(self, timeout_s: float) -> int:
        """On every node with several workers, one builds the drafter's index and the others map it: before the first
        request. Returns how many workers map."""
        return self._crew.share_indexes(timeout_s)

    def dump_stacks(self, timeout_s: float) -> dict[str, str]:
        """The stacks of all threads of every worker, by name; who does not answer in time is said so."""
        return dump_stacks({worker.name: worker.handle for worker in self._crew.roster}, timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Lets the workers remove what they put into shared memory; one that does not answer in time is left alone."""
        # Tidying up must not hide why the job ends.
        with contextlib.suppress(RayError):
            refs = [worker.handle.close.remote() for worker in self._crew.roster]
            ray.wait(refs, num_returns=len(refs), timeout=timeout_s)

    # ---- joining and leaving

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """Every worker by name: its state and what it reported about itself (pid and node among it)."""
        return {worker.name: {"state": worker.state, **worker.facts} for worker in self._crew.roster}

    def add_worker(self) -> str:
        """A worker more, which serves as soon as Ray has room for it and it knows what the others know; its name."""
        return self._crew.add().name

    def remove_worker(self, name: str, drain: bool = True) -> None:
        """Takes a worker out. drain: what it has started it finishes, and it goes after its next report; otherwise it
        goes at once, and others start that anew. What it had queued goes to others. PoolError for an unknown name, and
        for the last worker."""
        roster = self._crew.roster
        worker = roster.named(name)
        if all(other is worker or other.state == "leaving" for other in roster):
            raise PoolError(f"{name} is the last worker: the pool needs one")
        if drain and worker.state in ("serving", "leaving"):
            worker.state = "leaving"
            self._flight.take_back(self._crew, worker)
            return
        self._flight.take_all(worker)
        self._crew.dismiss(worker)

    def metrics(self) -> dict[str, float]:
        """Totals since the pool's start under pool/, and who serves now."""
        return self._crew.roster.metrics() | {"pool/requeued_requests": float(self._flight.num_requeued)}

    # ---- work

    def generate(
        self,
        requests: Sequence[Request],
        predicted: Mapping[str, float],
        timeout_s: float,
        speculate: bool = True,
    ) -> PoolResult:
        """Runs the requests to their end on all workers. speculate=False replays without drafting and learning."""
        deadline = time.monotonic() + timeout_s
        self._flight.submit(requests, predicted, speculate, whole=True)
        by_uid: dict[int, Rollout] = {}
        while self._flight.num_open:
            left_s = deadline - time.monotonic()
            if left_s <= 0.0:
                raise PoolTimeout(f"rollouts: waited {timeout_s:g} s for {self._who_holds()}")
            by_uid |= {rollout.request.uid: rollout for rollout in self._flight.poll(self._crew, left_s)}
        reports = self._report()
        rollouts = [by_uid[request.uid] for request in requests]
        stats, busy_s = [one.stats for one in reports], [one.busy_s for one in reports]
        stolen = self._flight.take_num_stolen()
        return PoolResult(rollouts, stats, busy_s, [one.observed for one in reports], stolen)

    def _who_holds(self) -> str:
        held = [f"{worker.name} ({n} requests)" for worker in self._crew.roster if (n := self._flight.num_held(worker))]
        waiting = self._flight.num_waiting
        return ", ".join([*held, f"{waiting} requests that no worker has taken"] if waiting else held)

    def _report(self) -> list[WorkerReport]:
        """What every worker did since it last told; who was leaving and is done goes."""
        refs = {worker: worker.handle.report.remote(CALL_TIMEOUT_S) for worker in self._crew.roster.holding()}
        reports: dict[Any, WorkerReport] = self._crew.gather(refs, "reports", CALL_TIMEOUT_S)
        for worker, report in reports.items():
            worker.guard = report.observed.guard
            if worker.state == "leaving" and not self._flight.num_held(worker):
                self._crew.dismiss(worker)
        return list(reports.values())

    def wait_beside(self, refs: Sequence[Any], wait_s: float) -> bool:
        """Waits up to wait_s for the first of other actors' objects, and looks after the workers meanwhile; whether one
        is there."""
        until = time.monotonic() + wait_s
        while True:
            left_s = max(0.0, min(until - time.monotonic(), LOOK_EVERY_S))
            if ray.wait(list(refs), timeout=left_s)[0]:
                return True
            self._crew.tick()
            if time.monotonic() >= until:
                return False

    # ---- news

    def update_policy(self, handle: WeightHandle | ComingHandle, timeout_s: float) -> WeightUpdate:
        """Every worker serves the handle's version afterwards, or, where this raises, what it served before."""
        return self._crew.update_policy(handle, "continue", timeout_s)

    def publish(self, step: int, records: list[HistoryRecord], learned: Learned | None, timeout_s: float) -> None:
        """Ships the step's finished rollouts to every worker once; their drafters roll their windows.

        learned: what all workers together have observed; with lengths and guards after a resume, None to leave it as
        it is. With another number of workers than before, the guards are dealt in turns.
        """
        roster, briefing = self._crew.roster, self._crew.briefing
        if not any(worker.known for worker in roster.starting()):
            briefing.everybody_knows()
        briefing.publish(step, records, learned)
        shared, observed = ray.put(records), ray.put(learned)
        guards = learned.guards if learned is not None and learned.guards else [None]
        refs = {
            worker: worker.handle.publish.remote(step, shared, observed, guards[i % len(guards)])
            for i, worker in enumerate(roster.holding())
        }
        self._crew.gather(refs, f"history of step {step}", timeout_s)

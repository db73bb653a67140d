"""The pool of rollout workers: Ray actors, routing, deadlines.

Invariants
- Every request handed to `generate` comes back exactly once, or PoolError says which worker failed.
- Requests are dealt longest predicted first to the least loaded worker, and a worker that runs out of them takes what
  others have queued; where they run changes no token.
- Every wait has a deadline, and the error names who was waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.actors import PoolError, PoolTimeout, dump_stacks, make_actor, wait_for
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.flight import CALL_TIMEOUT_S, Flight
from slipstream.rollout.learned import Learned, Observed
from slipstream.rollout.streaming_worker import StreamingWorker, WorkerReport
from slipstream.rollout.types import Request, Rollout
from slipstream.rollout.weight_handle import WeightHandle
from slipstream.rollout.weight_update import WeightUpdate, check_served, prepare_workers
from slipstream.rollout.worker import GenerateResult, WorkerSpec

Routing = Literal["sample", "group"]


@dataclass(frozen=True, slots=True)
class PoolResult:
    """Rollouts in the order of the requests; of each worker, the engine's totals, its busy seconds and what it
    observed. num_stolen: requests that an idle worker took from a loaded one."""

    rollouts: list[Rollout]
    stats: list[EngineStats]
    busy_s: list[float]
    observed: list[Observed]
    num_stolen: int = 0


def assign_requests(
    requests: Sequence[Request], predicted: Mapping[str, float], num_workers: int, routing: Routing
) -> list[list[Request]]:
    """Deals requests to workers: longest predicted first, each to the worker with the least predicted tokens.

    routing: `sample` deals single requests, so that a long prompt's samples share the workers evenly; `group` keeps a
    group together, so that its prompt is prefilled once and all its siblings draft from each other. predicted: expected
    response tokens per prompt_id; unknown prompts count as the mean of the known ones. Pure and deterministic.
    """
    units: dict[int, list[Request]] = defaultdict(list)
    for i, request in enumerate(requests):
        units[request.group if routing == "group" else i].append(request)
    fallback = sum(predicted.values()) / len(predicted) if predicted else 1.0
    ranked = sorted(units.values(), key=lambda unit: -predicted.get(unit[0].prompt_id, fallback))
    dealt: list[list[Request]] = [[] for _ in range(num_workers)]
    load = [0.0] * num_workers
    for unit in ranked:
        worker = min(range(num_workers), key=load.__getitem__)
        dealt[worker] += unit
        load[worker] += predicted.get(unit[0].prompt_id, fallback) * len(unit)
    return dealt


class RolloutPool:
    """`num_workers` Ray actors with the same spec.

    The actors are streaming workers, although all requests of a `generate` are known at once: such a worker can be
    spoken to between two engine steps, which is what moving queued requests needs. A batch in which nobody has to
    queue is one call per worker.
    """

    max_concurrency = 8
    """Threads of an actor: one each for a poll, a call that waits for a step, and a few that were given up."""

    def __init__(
        self,
        spec: WorkerSpec,
        num_workers: int,
        num_cpus: float,
        num_gpus: float,
        routing: Routing = "sample",
        steal: bool = True,
    ) -> None:
        self._routing = routing
        self._num_slots, self._steal = spec.max_live_requests, steal and num_workers > 1
        actor = make_actor(StreamingWorker, num_cpus, num_gpus, self.max_concurrency)
        self._workers: list[Any] = [actor.remote(spec) for _ in range(num_workers)]
        self._names = [f"rollout worker {i}" for i in range(num_workers)]
        self._flight = Flight(self._workers, self._names, self._num_slots, self._steal)

    def ready(self, timeout_s: float) -> list[dict[str, Any]]:
        """Waits until every worker has loaded its model; what each reports about itself."""
        return wait_for([w.ready.remote() for w in self._workers], self._names, "start", timeout_s)

    def share_indexes(self, timeout_s: float) -> int:
        """On every node with several workers, one builds the drafter's index and the others map it: before the first
        request. Returns how many workers map."""
        node_of = wait_for([w.node_id.remote() for w in self._workers], self._names, "sharing the index", timeout_s)
        num_readers = 0
        for node in dict.fromkeys(node_of):
            builder, *readers = [i for i, other in enumerate(node_of) if other == node]
            if not readers:
                continue
            opened = self._workers[builder].open_shared_folder.remote()
            path = wait_for([opened], [self._names[builder]], "sharing the index", timeout_s)[0]
            if path is None:
                continue
            refs = [self._workers[i].join_shared_folder.remote(path) for i in readers]
            wait_for(refs, [self._names[i] for i in readers], "sharing the index", timeout_s)
            num_readers += len(readers)
        return num_readers

    def dump_stacks(self, timeout_s: float) -> dict[str, str]:
        """The stacks of all threads of every worker, by name; who does not answer in time is said so."""
        return dump_stacks(dict(zip(self._names, self._workers, strict=True)), timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Lets the workers remove what they put into shared memory; one that does not answer in time is left alone."""
        # Tidying up must not hide why the job ends.
        with contextlib.suppress(RayError):
            refs = [worker.close.remote() for worker in self._workers]
            ray.wait(refs, num_returns=len(refs), timeout=timeout_s)

    def generate(
        self,
        requests: Sequence[Request],
        predicted: Mapping[str, float],
        timeout_s: float,
        speculate: bool = True,
    ) -> PoolResult:
        """Runs the requests to their end on all workers."""
        dealt = assign_requests(requests, predicted, len(self._workers), self._routing)
        moving = self._steal and max(map(len, dealt)) > self._num_slots
        run = self._run_moving if moving else self._run_apart
        rollouts, result = run(dealt, timeout_s, speculate)
        by_uid = {rollout.request.uid: rollout for rollout in rollouts}
        lost = [request.uid for request in requests if request.uid not in by_uid]
        if lost:
            raise PoolError(f"rollouts: {len(lost)} of {len(requests)} requests did not come back, first uid {lost[0]}")
        result.rollouts.extend(by_uid[request.uid] for request in requests)
        return result

    def _run_apart(
        self, dealt: list[list[Request]], timeout_s: float, speculate: bool
    ) -> tuple[list[Rollout], PoolResult]:
        """Every worker its own share. The rollouts, and a result without them."""
        refs = [
            worker.generate.remote(share, speculate, timeout_s)
            for worker, share in zip(self._workers, dealt, strict=True)
        ]
        results: list[GenerateResult] = wait_for(refs, self._names, "rollouts", timeout_s)
        rollouts = [rollout for result in results for rollout in result.rollouts]
        stats, seconds = [result.stats for result in results], [result.seconds for result in results]
        return rollouts, PoolResult([], stats, seconds, [result.observed for result in results])

    def _run_moving(
        self, dealt: list[list[Request]], timeout_s: float, speculate: bool
    ) -> tuple[list[Rollout], PoolResult]:
        """Somebody has to queue: whoever runs out of requests gets queued ones. Answers as _run_apart."""
        deadline = time.monotonic() + timeout_s
        refs = [worker.begin.remote(speculate, CALL_TIMEOUT_S) for worker in self._workers]
        wait_for(refs, self._names, "beginning a batch", CALL_TIMEOUT_S)
        for i, share in enumerate(dealt):
            for request in share:
                self._flight.assign(i, request.uid, 1.0)
        self._flight.submit(dict(enumerate(dealt)))
        rollouts: list[Rollout] = []
        while any(self._flight.num_held):
            left = deadline - time.monotonic()
            if left <= 0.0:
                late = [name for name, held in zip(self._names, self._flight.num_held, strict=True) if held]
                raise PoolTimeout(f"rollouts: waited {timeout_s:g} s for {', '.join(late)}")
            rollouts += self._flight.poll(left)
        reports = self._report()
        busy_s, observed = [one.busy_s for one in reports], [one.observed for one in reports]
        stolen = self._flight.take_num_stolen()
        return rollouts, PoolResult([], [one.stats for one in reports], busy_s, observed, stolen)

    def _report(self) -> list[WorkerReport]:
        """What every worker did since it last told, or began a batch."""
        refs = [worker.report.remote(CALL_TIMEOUT_S) for worker in self._workers]
        return wait_for(refs, self._names, "reports", CALL_TIMEOUT_S)

    def update_policy(self, handle: WeightHandle, timeout_s: float) -> WeightUpdate:
        """Every worker serves the handle's version afterwards, or, where this raises, what it served before."""
        update = prepare_workers(self._workers, self._names, handle, timeout_s)
        refs = [worker.update_policy.remote(handle, timeout_s, vouched=True) for worker in self._workers]
        check_served(wait_for(refs, self._names, f"weights of version {handle.version}", timeout_s), handle)
        return update

    def publish(self, step: int, records: list[HistoryRecord], learned: Learned | None, timeout_s: float) -> None:
        """Ships the step's finished rollouts to every worker once; their drafters roll their windows.

        learned: what all workers together have observed; with lengths and guards after a resume, None to leave it as
        it is. With another number of workers than before, the guards are dealt in turns.
        """
        shared, observed = ray.put(records), ray.put(learned)
        guards = learned.guards if learned is not None and learned.guards else [None]
        refs = [
            worker.publish.remote(step, shared, observed, guards[i % len(guards)])
            for i, worker in enumerate(self._workers)
        ]
        wait_for(refs, self._names, f"history of step {step}", timeout_s)

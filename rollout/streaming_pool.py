"""The pool of an asynchronous job: requests go in and rollouts come out at any time.

Invariants
- Every request comes back from `poll` exactly once, aborted ones too, or PoolError says which worker failed.
- Requests go to the worker with the least predicted work in flight; where they run changes no token.
- Every wait has a deadline, and the error names who was waited for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray

from slipstream.rollout.pool import PoolError, RolloutPool, Routing, wait_for
from slipstream.rollout.stepper import InFlight
from slipstream.rollout.streaming_worker import StreamingWorker, WorkerReport
from slipstream.rollout.types import Request, Rollout
from slipstream.rollout.worker import WorkerSpec

POLL_HOLD_S = 2.0
"""How long a worker holds a poll that has nothing to say yet."""
CALL_TIMEOUT_S = 600.0
"""Deadline of short calls, which wait for one engine step at most."""


class StreamingPool(RolloutPool):
    """`num_workers` streaming workers, and the requests that each of them holds."""

    actor_class = StreamingWorker
    max_concurrency = 8

    def __init__(
        self, spec: WorkerSpec, num_workers: int, num_cpus: float, num_gpus: float, routing: Routing = "sample"
    ) -> None:
        super().__init__(spec, num_workers, num_cpus, num_gpus, routing)
        self._held: list[dict[int, float]] = [{} for _ in range(num_workers)]
        self._load = [0.0] * num_workers
        self._polls: dict[Any, int] = {}

    @property
    def num_in_flight(self) -> list[int]:
        """Requests that each worker holds."""
        return [len(held) for held in self._held]

    def submit(self, requests: Sequence[Request], predicted: Mapping[str, float]) -> None:
        """Hands requests out. predicted: expected response tokens per prompt_id."""
        fallback = sum(predicted.values()) / len(predicted) if predicted else 1.0
        units: dict[int, list[Request]] = defaultdict(list)
        for i, request in enumerate(requests):
            units[request.group if self._routing == "group" else i].append(request)
        shares: dict[int, list[Request]] = defaultdict(list)
        for unit in units.values():
            worker = min(range(len(self._workers)), key=self._load.__getitem__)
            for request in unit:
                tokens = predicted.get(request.prompt_id, fallback)
                self._held[worker][request.uid] = tokens
                self._load[worker] += tokens
            shares[worker] += unit
        refs = [self._workers[i].submit.remote(share, CALL_TIMEOUT_S) for i, share in shares.items()]
        wait_for(refs, [self._names[i] for i in shares], "handing out requests", CALL_TIMEOUT_S)

    def poll(self, wait_s: float, other: Sequence[Any] = ()) -> list[Rollout]:
        """What has finished, from all workers; waits up to `wait_s` for the first, or for one of `other`'s objects."""
        asked = set(self._polls.values())
        for i, worker in enumerate(self._workers):
            if i not in asked:
                self._polls[worker.poll.remote(POLL_HOLD_S)] = i
        answered, _ = ray.wait([*self._polls, *other], num_returns=1, timeout=wait_s)
        out: list[Rollout] = []
        for ref in answered:
            if ref not in self._polls:
                continue
            worker = self._polls.pop(ref)
            for rollout in wait_for([ref], [self._names[worker]], "rollouts", CALL_TIMEOUT_S)[0]:
                tokens = self._held[worker].pop(rollout.request.uid, None)
                if tokens is None:
                    raise PoolError(f"{self._names[worker]} returned uid {rollout.request.uid}, which it does not hold")
                self._load[worker] -= tokens
                out.append(rollout)
        return out

    def abort(self, uids: Iterable[int]) -> None:
        """Takes requests out; what they have still comes from `poll`."""
        wanted = set(uids)
        shares = {i: sorted(wanted & held.keys()) for i, held in enumerate(self._held) if wanted & held.keys()}
        refs = [self._workers[i].abort.remote(share, CALL_TIMEOUT_S) for i, share in shares.items()]
        wait_for(refs, [self._names[i] for i in shares], "aborting requests", CALL_TIMEOUT_S)

    def swap_policy(self, weights: Any, version: int, in_flight: InFlight, timeout_s: float) -> None:
        """weights: a mapping of tensors, or a Ray object reference to one. Every worker serves `version` after."""
        refs = [worker.swap_policy.remote(weights, version, in_flight, timeout_s) for worker in self._workers]
        served = wait_for(refs, self._names, f"weights of version {version} ({in_flight})", timeout_s)
        if set(served) != {version}:
            raise PoolError(f"weights: workers serve versions {served}, expected {version}")

    def report(self) -> list[WorkerReport]:
        """What every worker did since the last report."""
        refs = [worker.report.remote(CALL_TIMEOUT_S) for worker in self._workers]
        return wait_for(refs, self._names, "reports", CALL_TIMEOUT_S)

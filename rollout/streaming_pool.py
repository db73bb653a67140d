"""The pool of an asynchronous job: requests go in and rollouts come out at any time.

Invariants
- Every request comes back from `poll` exactly once, aborted ones too, or PoolError says which worker failed.
- Requests go to the worker with the least predicted work in flight, and from its queue to a worker that runs out of
  work; where they run changes no token.
- Every wait has a deadline, and the error names who was waited for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slipstream.rollout.actors import wait_for
from slipstream.rollout.pool import RolloutPool
from slipstream.rollout.stepper import InFlight
from slipstream.rollout.streaming_worker import WorkerReport
from slipstream.rollout.types import Request, Rollout
from slipstream.rollout.weight_handle import WeightHandle
from slipstream.rollout.weight_update import WeightUpdate, check_served, prepare_workers


class StreamingPool(RolloutPool):
    """`num_workers` streaming workers, and the requests that each of them holds."""

    @property
    def num_in_flight(self) -> list[int]:
        """Requests that each worker holds."""
        return self._flight.num_held

    def take_num_stolen(self) -> int:
        """How many requests an idle worker took from a loaded one since the last call."""
        return self._flight.take_num_stolen()

    def submit(self, requests: Sequence[Request], predicted: Mapping[str, float]) -> None:
        """Hands requests out. predicted: expected response tokens per prompt_id."""
        fallback = sum(predicted.values()) / len(predicted) if predicted else 1.0
        units: dict[int, list[Request]] = defaultdict(list)
        for i, request in enumerate(requests):
            units[request.group if self._routing == "group" else i].append(request)
        shares: dict[int, list[Request]] = defaultdict(list)
        for unit in units.values():
            worker = self._flight.least_loaded()
            for request in unit:
                self._flight.assign(worker, request.uid, predicted.get(request.prompt_id, fallback))
            shares[worker] += unit
        self._flight.submit(shares)

    def poll(self, wait_s: float, other: Sequence[Any] = ()) -> list[Rollout]:
        """What has finished, from all workers; waits up to `wait_s` for the first, or for one of `other`'s objects."""
        return self._flight.poll(wait_s, other)

    def abort(self, uids: Iterable[int]) -> None:
        """Takes requests out; what they have still comes from `poll`."""
        self._flight.abort(uids)

    def swap_policy(self, handle: WeightHandle, in_flight: InFlight, timeout_s: float) -> WeightUpdate:
        """Every worker serves the handle's version afterwards, or, where this raises before anybody has swapped, what
        it served before. Bytes are fetched and verified while the engines step."""
        update = prepare_workers(self._workers, self._names, handle, timeout_s)
        refs = [worker.swap_policy.remote(handle, in_flight, timeout_s, vouched=True) for worker in self._workers]
        what = f"weights of version {handle.version} ({in_flight})"
        check_served(wait_for(refs, self._names, what, timeout_s), handle)
        return update

    def report(self) -> list[WorkerReport]:
        """What every worker did since the last report."""
        return self._report()

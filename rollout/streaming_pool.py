"""The pool of an asynchronous job: requests go in and rollouts come out at any time.

Invariants
- Every request comes back from `poll` exactly once, aborted ones too, or PoolError says why not.
- Requests go to the worker with the least predicted work in flight, and from its queue to a worker that runs out of
  work; where they run changes no token.
- What a worker that died had begun starts again from its prompt, under the weights that are served then: the versions
  of its tokens say so.
- Every wait has a deadline, and the error names who was waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slipstream.rollout.pool import RolloutPool
from slipstream.rollout.stepper import InFlight
from slipstream.rollout.streaming_worker import WorkerReport
from slipstream.rollout.types import Request, Rollout
from slipstream.rollout.weight_handle import ComingHandle, WeightHandle
from slipstream.rollout.weight_update import WeightUpdate


class StreamingPool(RolloutPool):
    """Workers, the requests that each of them holds, and those that wait."""

    @property
    def num_in_flight(self) -> dict[str, int]:
        """Requests that each worker holds, by name, and those that wait in the pool."""
        held = {worker.name: self._flight.num_held(worker) for worker in self._crew.roster}
        return held | {"waiting": self._flight.num_waiting}

    def take_num_stolen(self) -> int:
        """How many requests an idle worker took from a loaded one since the last call."""
        return self._flight.take_num_stolen()

    def submit(self, requests: Sequence[Request], predicted: Mapping[str, float]) -> None:
        """Hands requests out, as far as there is room. predicted: expected response tokens per prompt_id."""
        self._flight.submit(requests, predicted)
        self._flight.dispatch(self._crew)

    def poll(self, wait_s: float, other: Sequence[Any] = ()) -> list[Rollout]:
        """What has finished, from all workers; waits up to `wait_s` for the first, or for one of `other`'s objects."""
        return self._flight.poll(self._crew, wait_s, other)

    def abort(self, uids: Iterable[int]) -> None:
        """Takes requests out; what they have still comes from `poll`."""
        self._flight.abort(self._crew, uids)

    def swap_policy(self, handle: WeightHandle | ComingHandle, in_flight: InFlight, timeout_s: float) -> WeightUpdate:
        """Every worker serves the handle's version afterwards, or, where this raises before anybody has swapped, what
        it served before. Bytes are fetched and verified while the engines step."""
        return self._crew.update_policy(handle, in_flight, timeout_s)

    def report(self) -> list[WorkerReport]:
        """What every worker did since the last report."""
        return self._report()

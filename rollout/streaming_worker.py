"""The rollout worker of the pools: takes requests and gives rollouts at any time, weights change in between.

Invariants: as those of rollout.worker and rollout.stepper; the engine and the drafter are touched by the stepper's
thread alone once the first request came, a whole `generate` too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.guard import GuardState
from slipstream.rollout.learned import Learned, Observed
from slipstream.rollout.stepper import EngineStepper, InFlight
from slipstream.rollout.types import Request, Rollout
from slipstream.rollout.weight_handle import Share, WeightHandle
from slipstream.rollout.worker import GenerateResult, RolloutWorker, WorkerSpec


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Since the last report: the engine's totals, seconds it stepped, seconds that passed, what it observed."""

    stats: EngineStats
    busy_s: float
    wall_s: float
    observed: Observed


CALL_TIMEOUT_S = 600.0
"""Deadline of calls whose caller has one of its own; it only keeps a dead call from living for ever."""


class StreamingWorker(RolloutWorker):
    """A rollout worker whose engine steps in the background. Calls may come from several threads."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self._stepper = EngineStepper(self._engine, spec.num_threads)
        self._reported_at, self._reported_busy_s = time.perf_counter(), 0.0

    def generate(self, requests: list[Request], speculate: bool, timeout_s: float) -> GenerateResult:
        """As the plain worker's: one call of the stepper's thread, so that no other call is answered meanwhile."""
        drain = super().generate
        wait_s = timeout_s + CALL_TIMEOUT_S
        return self._stepper.call(lambda: drain(requests, speculate, timeout_s), "rollouts", wait_s)

    def begin(self, speculate: bool, timeout_s: float) -> None:
        """Before a batch that comes by `submit`: drafting on or off, and totals start at zero, as in `generate`."""
        self._stepper.call(lambda: self._begin(speculate), "beginning a batch", timeout_s)

    def _begin(self, speculate: bool) -> None:
        self.speculate(speculate)
        self._engine.stats(reset=True)
        self._reported_at, self._reported_busy_s = time.perf_counter(), self._stepper.busy_s

    def submit(self, requests: list[Request], timeout_s: float) -> None:
        """Queues requests; their rollouts come from `poll`."""
        self._stepper.submit(requests, timeout_s)

    def poll(self, wait_s: float) -> list[Rollout]:
        """What finished since the last call; waits up to `wait_s` for the first."""
        return self._stepper.poll(wait_s)

    def abort(self, uids: list[int], timeout_s: float) -> None:
        """Takes requests out; they come back from `poll` as they are."""
        self._stepper.abort(uids, timeout_s)

    def take_queued(self, max_count: int, timeout_s: float) -> list[Request]:
        """Up to max_count requests that have not started: they are no longer this worker's."""
        return self._stepper.call(lambda: self._engine.take_queued(max_count), "taking queued requests", timeout_s)

    def update_policy(self, handle: WeightHandle, timeout_s: float, vouched: bool = False) -> int:
        """Serves the handle's version, from between two batches on; returns it. See the plain worker's."""
        return self.swap_policy(handle, "continue", timeout_s, vouched)

    def swap_policy(self, handle: WeightHandle, in_flight: InFlight, timeout_s: float, vouched: bool = False) -> int:
        """Serves the handle's version, from between two engine steps on; returns it."""
        if not vouched:
            self._receiver.prepare(handle, Share(), timeout_s)
        version = handle.version
        return self._stepper.update_policy(lambda: self._receiver.commit(version), version, in_flight, timeout_s)

    def publish(
        self, step: int, records: list[HistoryRecord], learned: Learned | None, guard: GuardState | None = None
    ) -> None:
        """Step boundary of the learner: the drafter's window rolls, between two engine steps."""
        roll = super().publish
        self._stepper.call(lambda: roll(step, records, learned, guard), f"history of step {step}", CALL_TIMEOUT_S)

    def report(self, timeout_s: float) -> WorkerReport:
        """Totals since the last report."""
        return self._stepper.call(self._report, "a report", timeout_s)

    def _report(self) -> WorkerReport:
        now, busy_s = time.perf_counter(), self._stepper.busy_s
        report = WorkerReport(
            self._engine.stats(reset=True), busy_s - self._reported_busy_s, now - self._reported_at, self.observed()
        )
        self._reported_at, self._reported_busy_s = now, busy_s
        return report

    def close(self) -> None:
        """Ends the stepping and removes what lies in shared memory."""
        self._stepper.close()
        super().close()

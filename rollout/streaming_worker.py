"""The rollout worker of the pools: takes requests and gives rollouts at any time, weights change in between.

Invariants: as those of rollout.worker and rollout.stepper; the engine and the drafter are touched by the stepper's
thread alone once the first request came.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from typing import Any

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.guard import GuardState
from slipstream.rollout.learned import Learned, Observed
from slipstream.rollout.stepper import EngineStepper, InFlight
from slipstream.rollout.types import Request, Rollout
from slipstream.rollout.weight_handle import WeightHandle
from slipstream.rollout.weight_receiver import REPLACED, Receipt
from slipstream.rollout.worker import RolloutWorker, WorkerSpec


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Since the last report: the engine's totals, seconds it stepped, seconds that passed, what it observed."""

    stats: EngineStats
    busy_s: float
    wall_s: float
    observed: Observed


@dataclass(frozen=True, slots=True)
class Pulse:
    """A sign of life. num_steps: engine steps so far; step_s: seconds that the present one has taken."""

    num_steps: int
    step_s: float


CALL_TIMEOUT_S = 600.0
"""Deadline of calls whose caller has one of its own; it only keeps a dead call from living for ever."""


class StreamingWorker(RolloutWorker):
    """A rollout worker whose engine steps in the background. Calls may come from several threads."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self._stepper = EngineStepper(self._engine, spec.num_threads)
        self._reported_at, self._reported_busy_s = time.perf_counter(), 0.0

    def ready(self) -> dict[str, Any]:
        """As the plain worker's, with its process id and Ray node."""
        return super().ready() | {"pid": os.getpid(), "node": self.node_id()}

    def pulse(self) -> Pulse:
        """Answers while the engine steps: it touches nothing but two numbers."""
        return Pulse(self._stepper.num_steps, self._stepper.step_s)

    def submit(self, requests: list[Request], speculate: bool, timeout_s: float) -> None:
        """Queues requests; their rollouts come from `poll`. speculate: drafting on or off, from now on."""
        self._stepper.submit(requests, timeout_s, lambda: self.speculate(speculate))

    def poll(self, wait_s: float, at_least: int) -> list[Rollout]:
        """What finished since the last call; waits up to `wait_s` for `at_least` rollouts."""
        return self._stepper.poll(wait_s, at_least)

    def abort(self, uids: list[int], timeout_s: float) -> None:
        """Takes requests out; they come back from `poll` as they are."""
        self._stepper.abort(uids, timeout_s)

    def take_queued(self, max_count: int, timeout_s: float) -> list[Request]:
        """Up to max_count requests that have not started: they are no longer this worker's."""
        return self._stepper.call(lambda: self._engine.take_queued(max_count), "taking queued requests", timeout_s)

    def open_shared_folder(self) -> str | None:
        """As the plain worker's, between two engine steps."""
        opened = super().open_shared_folder
        return self._stepper.call(opened, "sharing the index", CALL_TIMEOUT_S)

    def join_shared_folder(self, path: str) -> None:
        """As the plain worker's, between two engine steps."""
        join = super().join_shared_folder
        self._stepper.call(lambda: join(path), "sharing the index", CALL_TIMEOUT_S)

    def commit_policy(self, version: int, in_flight: InFlight, timeout_s: float, *receipts: Receipt) -> int:
        """Serves what `prepare_policy` has fetched, from between two engine steps on; returns its version. receipts: of
        all workers that prepared it."""
        commit = functools.partial(self._receiver.commit, version, receipts)
        return self._stepper.update_policy(commit, version, in_flight, timeout_s)

    def update_policy(self, handle: WeightHandle, timeout_s: float) -> int:
        """Fetches, verifies and serves, as a worker that comes late; returns the version, or REPLACED when a newer one
        has taken the place of the handle's."""
        receipt = self._receiver.prepare_alone(handle, timeout_s)
        return REPLACED if receipt is None else self.commit_policy(handle.version, "continue", timeout_s, receipt)

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

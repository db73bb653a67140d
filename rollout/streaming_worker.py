"""The rollout worker of an asynchronous job: takes requests and gives rollouts at any time, weights change in between.

Invariants: as those of rollout.worker and rollout.stepper; the engine and the drafter are touched by the stepper's
thread alone once the first request came.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.stepper import EngineStepper, InFlight
from slipstream.rollout.types import Request, Rollout
from slipstream.rollout.worker import RolloutWorker, WorkerSpec


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Since the last report: the engine's totals, seconds it stepped, seconds that passed, what its drafts came to."""

    stats: EngineStats
    busy_s: float
    wall_s: float
    acceptance: AcceptanceModel


class StreamingWorker(RolloutWorker):
    """A rollout worker whose engine steps in the background. Calls may come from several threads."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self._stepper = EngineStepper(self._engine, spec.num_threads)
        self._reported_at, self._reported_busy_s = time.perf_counter(), 0.0

    def submit(self, requests: list[Request], timeout_s: float) -> None:
        """Queues requests; their rollouts come from `poll`."""
        self._stepper.submit(requests, timeout_s)

    def poll(self, wait_s: float) -> list[Rollout]:
        """What finished since the last call; waits up to `wait_s` for the first."""
        return self._stepper.poll(wait_s)

    def abort(self, uids: list[int], timeout_s: float) -> None:
        """Takes requests out; they come back from `poll` as they are."""
        self._stepper.abort(uids, timeout_s)

    def swap_policy(
        self, weights: Mapping[str, torch.Tensor], version: int, in_flight: InFlight, timeout_s: float
    ) -> int:
        """Replaces the policy between two engine steps; returns the version now served."""
        return self._stepper.update_policy(weights, version, in_flight, timeout_s)

    def publish(self, step: int, records: list[HistoryRecord], acceptance: AcceptanceModel | None) -> None:
        """Step boundary of the learner: the drafter's window rolls, between two engine steps."""
        roll = super().publish
        # The pool's deadline ends the wait; this one only keeps a dead call from living for ever.
        self._stepper.call(lambda: roll(step, records, acceptance), f"history of step {step}", 600.0)

    def report(self, timeout_s: float) -> WorkerReport:
        """Totals since the last report."""
        return self._stepper.call(self._report, "a report", timeout_s)

    def _report(self) -> WorkerReport:
        now, busy_s = time.perf_counter(), self._stepper.busy_s
        observed = self._engine.acceptance.minus(self._acceptance_before)
        self._acceptance_before = self._engine.acceptance.copy()
        report = WorkerReport(
            self._engine.stats(reset=True), busy_s - self._reported_busy_s, now - self._reported_at, observed
        )
        self._reported_at, self._reported_busy_s = now, busy_s
        return report

    def close(self) -> None:
        """Ends the stepping and removes what lies in shared memory."""
        self._stepper.close()
        super().close()

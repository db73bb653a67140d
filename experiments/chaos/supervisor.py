"""Runs the disturbed job: strikes, watches what becomes of it, and resumes it where it stopped.

Invariants: every wait has a deadline; after a fault the job has recovered when it is MARGIN_STEPS further than before,
at least one checkpoint later; a life that ends is resumed at once, by the plain command.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field

from slipstream.experiments.chaos.faults import KILLS_DRIVER, Fault, Scene, inject
from slipstream.trainer.errors import StalledError

MARGIN_STEPS = 3
POLL_S = 0.02
MAX_STOPS = 5
"""A job that stops more often than this after one fault does not come back by itself."""


@dataclass(slots=True)
class Outcome:
    """What became of one fault. ended: `recovered` in the same life, or `resumed`; stops: the line of every life that
    ended, with `unclear: ` in front where it was no single line; standstill_s: the longest time without a new step,
    from the fault to the recovery."""

    fault: Fault
    step: int
    notes: list[str] = field(default_factory=list)
    ended: str = "recovered"
    stops: list[str] = field(default_factory=list)
    standstill_s: float = 0.0
    hung: bool = False

    @property
    def num_unclear(self) -> int:
        """Lives that ended without one clear line."""
        return sum(stop.startswith("unclear: ") for stop in self.stops)


class Supervisor:
    """Drives one scene through a schedule."""

    def __init__(self, scene: Scene, num_steps: int, deadline_s: float) -> None:
        """num_steps: of the job; deadline_s: from one new step, or the start of a life, to the next new step."""
        self._scene, self._num_steps, self._deadline_s = scene, num_steps, deadline_s

    def run(self, schedule: list[Fault]) -> list[Outcome]:
        """The whole job, from its first life to its last step."""
        job = self._scene.job
        outcomes: list[Outcome] = []
        job.start()
        for fault in schedule:
            self._reach(fault.at_step, outcomes)
            time.sleep(fault.delay_s)
            outcomes.append(self._disturb(fault))
            _print(len(outcomes), len(schedule), outcomes[-1])
        self._reach(self._num_steps, outcomes)
        deadline = time.monotonic() + self._deadline_s
        while job.ended() is None:
            if time.monotonic() > deadline:
                raise StalledError(f"bench chaos: the job is at its last step and does not end; see {job.run_dir}")
            time.sleep(POLL_S)
        return outcomes

    def _reach(self, step: int, outcomes: list[Outcome]) -> None:
        """Waits for a step; a stop on the way is a late effect of the last fault."""
        job, last = self._scene.job, (-1, time.monotonic())
        while job.step < step:
            if job.step != last[0]:
                last = job.step, time.monotonic()
            if job.ended() is not None:
                if not outcomes or len(outcomes[-1].stops) >= MAX_STOPS:
                    raise StalledError(f"bench chaos: the job stops again and again: {job.errors()[-300:]}")
                self._resume(outcomes[-1])
            if time.monotonic() - last[1] > self._deadline_s:
                raise StalledError(f"bench chaos: no step for {self._deadline_s:g} s after step {last[0]}")
            time.sleep(POLL_S)

    def _disturb(self, fault: Fault) -> Outcome:
        scene, job = self._scene, self._scene.job
        outcome = Outcome(fault, job.step)
        newest = quiet_since = time.monotonic()
        inject(fault, scene)
        reached, target = outcome.step, min(outcome.step + MARGIN_STEPS, self._num_steps)
        while reached < target:
            now, step = time.monotonic(), job.step
            if step > reached:
                outcome.standstill_s = max(outcome.standstill_s, now - newest)
                reached, newest, quiet_since = step, now, now
            elif job.ended() is not None and len(outcome.stops) < MAX_STOPS:
                self._resume(outcome)
                quiet_since = time.monotonic()
            elif now - quiet_since > self._deadline_s or job.ended() is not None:
                self._give_up(outcome)
                break
            time.sleep(POLL_S)
        scene.repair()
        outcome.notes = list(scene.notes)
        return outcome

    def _resume(self, outcome: Outcome) -> None:
        scene, job = self._scene, self._scene.job
        scene.repair()
        line, code = job.stop_line(), job.ended()
        if code == -signal.SIGKILL and outcome.fault.kind in KILLS_DRIVER:
            outcome.stops.append("killed")
        elif line is not None:
            outcome.stops.append(line)
        else:
            outcome.stops.append(f"unclear: exit code {code}: {job.errors()[-2000:]}")
        outcome.ended = "resumed"
        job.start()

    def _give_up(self, outcome: Outcome) -> None:
        """A job that neither gets on nor stops is ended, with its stacks, and resumed."""
        outcome.hung = True
        self._scene.job.kill(stacks=True)
        outcome.stops.append(f"hung: {self._scene.job.errors()[-4000:]}")
        outcome.ended = "resumed"
        self._scene.repair()
        self._scene.job.start()


def _print(number: int, total: int, outcome: Outcome) -> None:
    stop = f" | {outcome.stops[0][:160]}" if outcome.stops else ""
    notes = ", ".join(outcome.notes)
    state = "hung" if outcome.hung else outcome.ended
    print(
        f"fault {number:>2}/{total} | {outcome.fault.kind} at step {outcome.step} ({notes}) | {state} in "
        f"{outcome.standstill_s:.1f} s{stop}",
        flush=True,
    )

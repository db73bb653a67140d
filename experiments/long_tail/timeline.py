"""Records who was live when, and where each rollout's tokens came from.

Invariants: recording changes no token and is not timed against other arms; a rollout's line has one point per forward
pass; tokens that the model sampled itself are source "none".
"""

from __future__ import annotations

import time

import numpy as np

from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout
from slipstream.trainer.timeline_plots import Line


class Recorder:
    """Drains an engine step by step. lines: of all rollouts drained, in the order in which they finished.

    Time runs on over several batches.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._clock = 0.0

    def drain(self, engine: TorchEngine, requests: list[Request]) -> list[Rollout]:
        """As engine.drain, for requests that are all live at once; rollouts in the order of the requests."""
        engine.submit(requests)
        done: dict[int, Rollout] = {}
        table = engine.table
        accepted: dict[int, np.ndarray] = {}
        where: dict[int, int] = {}
        lines = {request.uid: Line([], []) for request in requests}
        while len(done) < len(requests):
            started = time.perf_counter()
            finished = engine.step()
            self._clock += time.perf_counter() - started
            where |= table.slot_of
            for uid, slot in where.items():
                if uid in done:
                    continue
                now = table.accepted[slot].copy()
                gained = now - accepted.get(uid, np.zeros_like(now))
                accepted[uid] = now
                lines[uid].times.append(self._clock)
                lines[uid].sources.append(int(gained.argmax()) if gained.any() else 0)
            for rollout in finished:
                done[rollout.request.uid] = rollout
                self.lines.append(lines[rollout.request.uid])
        return [done[request.uid] for request in requests]

"""Which workers are hung.

Invariants
- A worker is asked by a ping on a thread of its own (WATCH_GROUP), so that a long step (a compilation, a big prefill)
  answers as well as an idle engine: what does not answer within worker_timeout_s is a stopped process, one whose
  interpreter is locked up, or a machine that is not reachable.
- What answers but has been in one engine step for worker_step_timeout_s is hung too: a stuck kernel, an endless loop.
  Steps are counted, and the time in the present one is measured, by the worker itself.
- Silence counts only while this side listens: a driver that was busy or asleep suspects nobody for it.
- This only tells; it ends nobody.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray

from slipstream.rollout.actors import WATCH_GROUP, ActorLost, fetch
from slipstream.rollout.roster import Worker
from slipstream.rollout.streaming_worker import Pulse

MAX_GAP_S = 2.0
"""Between two looks no more than this counts as silence."""
MAX_PING_EVERY_S = 5.0


class Patience:
    """Seconds of silence, counted only while somebody listens. Pure: the caller brings the clock."""

    def __init__(self) -> None:
        self._looked_at: float | None = None
        self.silent_s = 0.0

    def look(self, now_s: float, heard: bool) -> float:
        """A look at `now_s`; the silence so far. Any sign of life ends it."""
        if heard:
            self.silent_s = 0.0
        elif self._looked_at is not None:
            self.silent_s += min(max(0.0, now_s - self._looked_at), MAX_GAP_S)
        self._looked_at = now_s
        return self.silent_s


@dataclass(frozen=True, slots=True)
class Verdict:
    """A worker that is to be given up, and why. hung: it still runs, as far as anybody knows."""

    worker: Worker
    reason: str
    hung: bool


@dataclass(slots=True)
class _Watched:
    ping: Any = None
    next_ping_at: float = 0.0
    patience: Patience = field(default_factory=Patience)


class Health:
    """Pings workers. timeout_s, step_timeout_s: see PoolLimits."""

    def __init__(self, timeout_s: float, step_timeout_s: float) -> None:
        self._timeout_s, self._step_timeout_s = timeout_s, step_timeout_s
        self._ping_every_s = min(MAX_PING_EVERY_S, timeout_s / 4)
        self._watched: dict[Worker, _Watched] = {}

    def check(self, workers: Iterable[Worker]) -> list[Verdict]:
        """Those of `workers` that are hung or were found dead. Never waits."""
        now = time.monotonic()
        self._watched = {worker: self._watched.get(worker) or _Watched() for worker in workers}
        for worker, watched in self._watched.items():
            if watched.ping is None and now >= watched.next_ping_at:
                watched.ping = worker.handle.pulse.options(concurrency_group=WATCH_GROUP).remote()
        pings = [watched.ping for watched in self._watched.values() if watched.ping is not None]
        answered = set(ray.wait(pings, num_returns=len(pings), timeout=0)[0]) if pings else set()
        judged = [self._judge(worker, watched, answered, now) for worker, watched in self._watched.items()]
        return [verdict for verdict in judged if verdict is not None]

    def _judge(self, worker: Worker, watched: _Watched, answered: set[Any], now: float) -> Verdict | None:
        if watched.ping is None:
            return None
        if watched.ping not in answered:
            if watched.patience.look(now, heard=False) <= self._timeout_s:
                return None
            return Verdict(worker, f"no answer to a ping for {self._timeout_s:g} s (cluster.worker_timeout_s)", True)
        ping, watched.ping = watched.ping, None
        watched.next_ping_at = now + self._ping_every_s
        watched.patience.look(now, heard=True)
        try:
            pulse: Pulse = fetch(ping, worker.name, "a ping")
        except ActorLost as lost:
            return Verdict(worker, str(lost), False)
        if pulse.step_s <= self._step_timeout_s:
            return None
        reason = f"engine step {pulse.num_steps + 1} has taken {pulse.step_s:.0f} s"
        return Verdict(worker, f"{reason} (cluster.worker_step_timeout_s={self._step_timeout_s:g})", True)

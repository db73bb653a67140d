"""The actors of the pool: they are started, told what the others know, asked, watched, given up and started again.

Invariants
- A death is seen by whichever call meets it first, or by the health check; it is acted upon once: the process is ended
  for sure, what the worker held goes back to the pool, and a new incarnation starts if it has a restart left.
- A new incarnation serves only once it has the weights, the history and the learned state of the moment it begins to
  serve; meanwhile nobody waits for it, unless nobody else serves.
- An error that a call raised is no death: it would come again, and ends the job in one line.
- Every wait has a deadline; while the crew waits, starts and health go on (`tick`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from slipstream.rollout.actors import ActorLost, PoolTimeout, fetch
from slipstream.rollout.briefing import Briefing
from slipstream.rollout.health import Health, Patience
from slipstream.rollout.roster import PoolLimits, Roster, Worker, check_alike, worker_name
from slipstream.rollout.sharing import IndexSharing
from slipstream.rollout.stepper import InFlight
from slipstream.rollout.weight_handle import ComingHandle, WeightHandle
from slipstream.rollout.weight_receiver import REPLACED
from slipstream.rollout.weight_update import WeightUpdate, check_served, prepare_workers

Errand = Generator[Any, Any, None]
"""Calls to one worker, each made when the one before has ended: yields a Ray object, is sent its value."""

LOOK_EVERY_S = 1.0
"""Longest wait between two ticks."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Running:
    worker: Worker
    errand: Errand
    what: str
    ref: Any = None


class Crew:
    """make: a new actor for the worker of that name. on_lost: takes back what a worker held; how many requests."""

    def __init__(
        self,
        make: Callable[[str], Any],
        num_workers: int,
        limits: PoolLimits,
        briefing: Briefing,
        on_lost: Callable[[Worker], int],
    ) -> None:
        self._make, self._limits, self._on_lost = make, limits, on_lost
        self.briefing, self.roster, self.sharing = briefing, Roster(limits.max_worker_restarts), IndexSharing()
        self._health = Health(limits.worker_timeout_s, limits.worker_step_timeout_s)
        self._errands: list[_Running] = []
        self._nobody_serves = Patience()
        self._starts: dict[Worker, Patience] = {}
        for _ in range(num_workers):
            self.add()

    # ---- joining and leaving

    def add(self) -> Worker:
        """A worker more; it serves as soon as there is room for it and it has been told everything."""
        number = self.roster.next_number()
        return self._start(Worker(number, self._make(worker_name(number))))

    def dismiss(self, worker: Worker) -> None:
        """Ends a worker that holds nothing any more."""
        with contextlib.suppress(RayError):
            ray.wait([worker.handle.close.remote()], timeout=LOOK_EVERY_S)
        self._forget(worker)
        self.roster.leave(worker)
        self._elect()

    def lose(self, worker: Worker, reason: str, hung: bool = False) -> None:
        """Acts upon a death; a second report of the same one does nothing. PoolError when the job cannot go on."""
        if worker.state == "gone":
            return
        self._forget(worker)
        num_held = self._on_lost(worker)
        again = self.roster.died(worker, reason, hung)
        _log.warning("%s died (%s); %d requests that it held go to others", worker.name, reason, num_held)
        if again:
            self._start(self._successor(worker, worker.incarnation + 1))
        self._elect()

    def _forget(self, worker: Worker) -> None:
        # What is stopped or cut off must not come back and serve old weights, nor keep its GPU.
        ray.kill(worker.handle, no_restart=True)
        for running in [one for one in self._errands if one.worker is worker]:
            self._errands.remove(running)
            running.errand.close()
        self._starts.pop(worker, None)
        self.sharing.gone(worker)

    def _successor(self, worker: Worker, incarnation: int) -> Worker:
        return Worker(worker.number, self._make(worker.name), incarnation, guard=worker.guard)

    def _start(self, worker: Worker) -> Worker:
        self.roster.join(worker)
        self._starts[worker] = Patience()
        self._go(worker, self._bring_up(worker), "start")
        return worker

    def _bring_up(self, worker: Worker) -> Errand:
        worker.facts = yield worker.handle.ready.remote()
        worker.node = str(worker.facts["node"])
        check_alike(worker, self.roster)
        version = 0
        while True:
            path, told = self.sharing.path_for(worker), self.briefing.next_for(worker.known)
            if path != worker.folder and path:
                yield from self._join(worker, path)
            elif (weights := self.briefing.weights) is not None and version != weights.version:
                served = yield worker.handle.update_policy.remote(weights, self._limits.start_timeout_s)
                if served == REPLACED and self.briefing.weights is not weights:
                    continue
                version = weights.version
                check_served({worker.name: served}, weights)
            elif told is not None:
                records, learned = ray.put(told.records), ray.put(told.learned)
                yield worker.handle.publish.remote(told.step, records, learned, worker.guard)
                worker.known = told.serial
            else:
                break
        self._starts.pop(worker, None)
        worker.state = "serving"
        if worker.incarnation:
            _log.warning("%s serves again, weights of version %d", worker.name, version)
        self._elect()

    # ---- shared indexes

    def _elect(self) -> None:
        for builder in self.sharing.elect(self.roster.serving()):
            self._go(builder, self._open_folder(builder), "sharing the index")

    def _open_folder(self, builder: Worker) -> Errand:
        path = yield builder.handle.open_shared_folder.remote()
        self.sharing.opened(builder, path)
        for worker in self.roster.serving():
            wanted = self.sharing.path_for(worker)
            if wanted and wanted != worker.folder:
                self._go(worker, self._join(worker, wanted), "sharing the index")

    def _join(self, worker: Worker, path: str) -> Errand:
        yield worker.handle.join_shared_folder.remote(path)
        worker.folder = path

    def share_indexes(self, timeout_s: float) -> int:
        """See RolloutPool.share_indexes."""
        self.sharing.enabled = True
        self._elect()
        self.settle("sharing the index", timeout_s)
        return sum(bool(worker.folder) for worker in self.roster)

    # ---- asking

    def tick(self) -> None:
        """Starts go on, the hung are given up. Never waits; PoolTimeout when nobody has served for too long."""
        self._advance_errands()
        for verdict in self._health.check(self.roster.holding()):
            self.lose(verdict.worker, verdict.reason, verdict.hung)
        now, limit_s = time.monotonic(), self._limits.start_timeout_s
        for worker, patience in list(self._starts.items()):
            if patience.look(now, heard=False) > limit_s:
                # It waits for a place, or its process hangs: nobody can tell, and a new one is right for both.
                self._forget(worker)
                worker.state = "gone"
                self._start(self._successor(worker, worker.incarnation))
        if self._nobody_serves.look(now, heard=bool(self.roster.holding())) > limit_s:
            waited_for = ", ".join(worker.name for worker in self.roster)
            raise PoolTimeout(f"no rollout worker serves: waited {limit_s:g} s for {waited_for} to start")

    @property
    def refs(self) -> list[Any]:
        """What ends when `tick` has something to do."""
        return [running.ref for running in self._errands]

    def gather(self, refs: Mapping[Worker, Any], what: str, timeout_s: float) -> dict[Worker, Any]:
        """The results of calls; who dies meanwhile is left out and replaced. PoolTimeout names who was late."""
        deadline, out, pending = time.monotonic() + timeout_s, {}, dict(refs)
        while pending:
            slice_s = min(LOOK_EVERY_S, max(0.0, deadline - time.monotonic()))
            done = set(ray.wait(list(pending.values()), num_returns=len(pending), timeout=slice_s)[0])
            for worker in [one for one, ref in pending.items() if ref in done]:
                try:
                    out[worker] = fetch(pending.pop(worker), worker.name, what)
                except ActorLost as lost:
                    self.lose(worker, str(lost))
            self.tick()
            pending = {worker: ref for worker, ref in pending.items() if worker.state != "gone"}
            if pending and time.monotonic() >= deadline:
                late = ", ".join(worker.name for worker in pending)
                raise PoolTimeout(f"{what}: waited {timeout_s:g} s for {late}")
        return out

    def settle(self, what: str, timeout_s: float) -> None:
        """Waits until nobody starts or is being told anything."""
        deadline = time.monotonic() + timeout_s
        while self._errands:
            ray.wait(self.refs, num_returns=1, timeout=LOOK_EVERY_S)
            self.tick()
            if self._errands and time.monotonic() >= deadline:
                late = ", ".join(dict.fromkeys(running.worker.name for running in self._errands))
                raise PoolTimeout(f"{what}: waited {timeout_s:g} s for {late}")

    def update_policy(self, handle: WeightHandle | ComingHandle, in_flight: InFlight, timeout_s: float) -> WeightUpdate:
        """All workers serve the version, verified, and newcomers are given it from now on. PoolError names who could
        not prepare it, and all serve what they served; or who does not serve it."""

        def commit(actor: Any, version: int, receipts: Sequence[Any]) -> Any:
            return actor.commit_policy.remote(version, in_flight, timeout_s, *receipts)

        workers = self.roster.holding()
        actors, nodes = {worker: worker.handle for worker in workers}, [worker.node for worker in workers]
        update, refs = prepare_workers(actors, nodes, handle, commit, timeout_s, self.gather)
        weights = self.briefing.weights = update.handle
        # Whoever came to serve while the others prepared was started with the version before.
        late = [worker for worker in self.roster.holding() if worker not in refs]
        refs |= {worker: worker.handle.update_policy.remote(weights, timeout_s) for worker in late}
        served = self.gather(refs, f"weights of version {weights.version} ({in_flight})", timeout_s)
        check_served({worker.name: version for worker, version in served.items()}, weights)
        return update

    def _go(self, worker: Worker, errand: Errand, what: str) -> None:
        running = _Running(worker, errand, what)
        self._errands.append(running)
        self._send(running, None)

    def _send(self, running: _Running, value: Any) -> None:
        try:
            running.ref = running.errand.send(value)
        except StopIteration:
            self._errands.remove(running)

    def _advance_errands(self) -> None:
        if not self._errands:
            return
        done = set(ray.wait(self.refs, num_returns=len(self._errands), timeout=0)[0])
        for running in [one for one in self._errands if one.ref in done]:
            if running not in self._errands:
                continue
            try:
                value = fetch(running.ref, running.worker.name, running.what)
            except ActorLost as lost:
                self.lose(running.worker, str(lost))
            else:
                self._send(running, value)

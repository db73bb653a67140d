"""The requests of the pool: who holds which, what waits, what has finished, and what moves.

Invariants
- Every request handed in comes back from `poll` exactly once, aborted, moved and re-queued ones too, or PoolError says
  why not. Only a rollout of the worker that holds its request is taken.
- A worker holds at most its slots and max_queued_per_worker requests; the others wait here, in order, and go to whoever
  has room first. What a dead worker held goes to the head of the line, the same requests with the same uids: their
  tokens are those that the dead worker would have returned, if the weights are the same.
- A request that max_deaths_per_request dying workers held is taken for their cause.
- Every wait has a deadline, and the error names who was waited for.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from slipstream.rollout.actors import ActorLost, PoolError, fetch
from slipstream.rollout.crew import LOOK_EVERY_S, Crew
from slipstream.rollout.roster import PoolLimits, Worker
from slipstream.rollout.routing import Dealer, Routing, Unit, longest_first, make_units
from slipstream.rollout.stealing import plan_moves
from slipstream.rollout.types import Request, Rollout

POLL_HOLD_S = 2.0
"""How long a worker holds a poll that has nothing to say yet."""
CALL_TIMEOUT_S = 600.0
"""Deadline of short calls, which wait for one engine step at most."""


@dataclass(frozen=True, slots=True)
class _Held:
    request: Request
    tokens: float


class Flight:
    """num_slots: requests that a worker runs at once; steal: whether queued requests move between workers."""

    def __init__(self, num_slots: int, routing: Routing, steal: bool, limits: PoolLimits) -> None:
        queued = num_slots if limits.max_queued_per_worker is None else limits.max_queued_per_worker
        self._dealer = Dealer(routing, num_slots + queued, limits.prompt_load_limit)
        self._num_slots, self._steal, self._max_deaths = num_slots, steal, limits.max_deaths_per_request
        self._waiting: deque[Unit] = deque()
        self._held: dict[Worker, dict[int, _Held]] = {}
        self._open: set[int] = set()
        self._polls: dict[Any, Worker] = {}
        self._submits: dict[Any, Worker] = {}
        self._deaths: dict[int, list[str]] = defaultdict(list)
        self._unwanted: set[int] = set()
        self._aborted: list[Rollout] = []
        self._speculate, self._whole = True, False
        self._num_stolen = self.num_requeued = 0

    # ---- who has what

    @property
    def num_open(self) -> int:
        """Requests that have not come back."""
        return len(self._open)

    def num_held(self, worker: Worker) -> int:
        """Requests of one worker."""
        return len(self._held.get(worker, ()))

    @property
    def num_waiting(self) -> int:
        """Requests that no worker has yet."""
        return sum(len(unit.requests) for unit in self._waiting)

    def _give(self, worker: Worker, request: Request, tokens: float) -> None:
        self._held.setdefault(worker, {})[request.uid] = _Held(request, tokens)

    def _release(self, worker: Worker, uid: int) -> _Held:
        held = self._held.get(worker, {}).pop(uid, None)
        if held is None:
            raise PoolError(f"{worker.name} returned uid {uid}, which it does not hold")
        return held

    # ---- in

    def submit(
        self,
        requests: Sequence[Request],
        predicted: Mapping[str, float],
        speculate: bool = True,
        whole: bool = False,
    ) -> None:
        """Queues requests; `poll` hands them out. predicted: see make_units. whole: a batch that is of use once all of
        it is there: longest first, and workers need not report every single rollout. PoolError for an open uid."""
        uids = {request.uid for request in requests}
        if len(uids) < len(requests) or uids & self._open:
            twice = [uid for uid, count in Counter(request.uid for request in requests).items() if count > 1]
            raise PoolError(f"uid {[*twice, *sorted(uids & self._open)][0]} was submitted twice")
        # Larger ones would not fit into a worker that has a free slot.
        most = max(1, self._dealer.max_held - self._num_slots)
        units = make_units(requests, predicted, self._dealer.routing, most)
        self._open |= uids
        self._waiting.extend(longest_first(units) if whole else units)
        self._speculate, self._whole = speculate, whole

    def dispatch(self, crew: Crew) -> None:
        """Hands waiting requests to workers that have room. Does not wait."""
        if not self._waiting:
            return
        serving = {worker.name: worker for worker in crew.roster.serving()}
        if not serving:
            return
        held = {name: self.num_held(worker) for name, worker in serving.items()}
        load = {name: self._load(worker) for name, worker in serving.items()}
        shares: dict[Worker, list[Request]] = defaultdict(list)
        for name in self._dealer.deal(self._waiting, held, load):
            unit, worker = self._waiting.popleft(), serving[name]
            shares[worker] += unit.requests
            for request in unit.requests:
                self._give(worker, request, unit.tokens)
        self._hand_over(shares)

    def _load(self, worker: Worker) -> float:
        return sum(held.tokens for held in self._held.get(worker, {}).values())

    def _hand_over(self, shares: Mapping[Worker, Sequence[Request]]) -> None:
        for worker, share in shares.items():
            self._submits[worker.handle.submit.remote(list(share), self._speculate, CALL_TIMEOUT_S)] = worker

    # ---- out

    def poll(self, crew: Crew, wait_s: float, other: Sequence[Any] = ()) -> list[Rollout]:
        """What has finished, from all workers; waits up to `wait_s` for the first, or for one of `other`'s objects."""
        until = time.monotonic() + wait_s
        while True:
            crew.tick()
            self.dispatch(crew)
            if self._steal:
                self._move(crew)
            self._ask(crew)
            out, self._aborted = self._aborted, []
            left_s = 0.0 if out else max(0.0, min(until - time.monotonic(), LOOK_EVERY_S))
            # Not for answers to submits, which say nothing: who failed to take requests answers no poll either.
            refs = [*self._polls, *crew.refs, *other]
            if refs:
                ray.wait(refs, num_returns=1, timeout=left_s)
            else:
                time.sleep(min(left_s, 0.05))
            out += self._take(crew)
            if out or time.monotonic() >= until or (other and ray.wait(list(other), timeout=0)[0]):
                return out

    def _ask(self, crew: Crew) -> None:
        asked = set(self._polls.values())
        queued = self._waiting or any(len(held) > self._num_slots for held in self._held.values())
        for worker in crew.roster.holding():
            if worker not in asked and self.num_held(worker):
                at_least = self.num_held(worker) if self._whole and not queued else 1
                self._polls[worker.handle.poll.remote(POLL_HOLD_S, at_least)] = worker

    def _take(self, crew: Crew) -> list[Rollout]:
        """What polls have brought by now; answers to submits are looked at for errors."""
        out: list[Rollout] = []
        calls = self._polls | self._submits
        if not calls:
            return out
        for ref in ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
            is_poll, worker = ref in self._polls, calls[ref]
            self._polls.pop(ref, None)
            self._submits.pop(ref, None)
            if worker.state == "gone":
                continue
            try:
                answer = fetch(ref, worker.name, "rollouts" if is_poll else "handing out requests")
            except ActorLost as lost:
                crew.lose(worker, str(lost))
                continue
            for rollout in answer if is_poll else ():
                self._release(worker, rollout.request.uid)
                out.append(self._done(rollout))
        return out

    def _done(self, rollout: Rollout) -> Rollout:
        self._open.discard(rollout.request.uid)
        self._deaths.pop(rollout.request.uid, None)
        self._unwanted.discard(rollout.request.uid)
        return rollout

    # ---- moving

    def _move(self, crew: Crew) -> None:
        """Idle workers get what others have queued. What has started since the last poll stays where it is."""
        serving = crew.roster.serving()
        moves = plan_moves([self.num_held(worker) for worker in serving], self._num_slots)
        if not moves:
            return
        wanted: dict[Worker, int] = defaultdict(int)
        for move in moves:
            wanted[serving[move.source]] += move.count
        taken = self._take_queued(crew, wanted)
        shares: dict[Worker, list[Request]] = defaultdict(list)
        for move in moves:
            source, target = serving[move.source], serving[move.target]
            mine, taken[source] = taken[source][: move.count], taken[source][move.count :]
            if target.state != "serving":
                self._wait_again([self._release(source, request.uid) for request in mine])
                continue
            for request in mine:
                self._give(target, request, self._release(source, request.uid).tokens)
            shares[target] += mine
        self._num_stolen += sum(map(len, shares.values()))
        self._hand_over({worker: share for worker, share in shares.items() if share})

    def _take_queued(self, crew: Crew, wanted: Mapping[Worker, int]) -> dict[Worker, list[Request]]:
        """Requests that have not started, still held by who gave them; nothing from who died meanwhile."""
        refs = {worker: worker.handle.take_queued.remote(count, CALL_TIMEOUT_S) for worker, count in wanted.items()}
        answers = crew.gather(refs, "taking queued requests", CALL_TIMEOUT_S)
        return {worker: [] if worker.state == "gone" else answers.get(worker, []) for worker in wanted}

    def take_num_stolen(self) -> int:
        """How many requests have moved since the last call."""
        num_stolen, self._num_stolen = self._num_stolen, 0
        return num_stolen

    # ---- back

    def take_back(self, crew: Crew, worker: Worker) -> None:
        """What the worker has queued waits here again; what it has started stays."""
        taken = self._take_queued(crew, {worker: self.num_held(worker)})[worker]
        self._wait_again([self._release(worker, request.uid) for request in taken])

    def take_all(self, worker: Worker) -> int:
        """Everything the worker held waits here again, whatever became of it there; how many requests."""
        held = list(self._held.pop(worker, {}).values())
        for calls in (self._polls, self._submits):
            for ref in [ref for ref, asked in calls.items() if asked is worker]:
                del calls[ref]
        self._wait_again(held)
        return len(held)

    def requeue(self, worker: Worker) -> int:
        """As take_all, of a worker that died. PoolError where a request was held by too many such."""
        uids = list(self._held.get(worker, {}))
        for uid in uids:
            self._deaths[uid].append(worker.name)
        self.num_requeued += self.take_all(worker)
        worst = max(uids, key=lambda uid: len(self._deaths[uid]), default=-1)
        holders = self._deaths[worst] if uids else []
        if len(holders) >= self._max_deaths:
            raise PoolError(
                f"uid {worst} was held by {len(holders)} workers that died ({', '.join(holders)}), "
                f"the last of them held {len(uids)} requests; cluster.max_deaths_per_request={self._max_deaths}"
            )
        return len(uids)

    def _wait_again(self, held: Sequence[_Held]) -> None:
        self._waiting.extendleft(Unit((one.request,), one.tokens) for one in reversed(held))
        # A worker that died may have taken out what was aborted, and not yet have said so.
        self._drop_unwanted()

    def abort(self, crew: Crew, uids: Iterable[int]) -> None:
        """Takes requests out; what they have still comes from `poll`."""
        wanted = set(uids) & self._open
        self._unwanted |= wanted
        self._drop_unwanted()
        shares = {worker: sorted(wanted & held.keys()) for worker, held in self._held.items() if wanted & held.keys()}
        # A request that is still on its way to its worker could not be found there.
        while on_the_way := {worker: ref for ref, worker in self._submits.items() if worker in shares}:
            crew.gather(on_the_way, "handing out requests", CALL_TIMEOUT_S)
            for ref in on_the_way.values():
                self._submits.pop(ref, None)
        refs = {
            worker: worker.handle.abort.remote(share, CALL_TIMEOUT_S)
            for worker, share in shares.items()
            if worker.state != "gone"
        }
        crew.gather(refs, "aborting requests", CALL_TIMEOUT_S)

    def _drop_unwanted(self) -> None:
        """What was aborted and waits here needs no worker."""
        if not self._unwanted:
            return
        waiting, self._waiting = self._waiting, deque()
        for unit in waiting:
            kept = tuple(request for request in unit.requests if request.uid not in self._unwanted)
            self._aborted += [self._done(_nothing(one)) for one in unit.requests if one.uid in self._unwanted]
            if kept:
                self._waiting.append(Unit(kept, unit.tokens))


def _nothing(request: Request) -> Rollout:
    empty = np.zeros(0, np.int32)
    return Rollout(request, empty, empty.astype(np.float32), empty, "abort")

"""The requests in flight on streaming workers: who holds which, what has finished, and what moves to an idle worker.

Invariants
- Every request handed out comes back from `poll` exactly once, aborted and moved ones too, or PoolError says which
  worker failed.
- A request is held by one worker at any time; where it runs changes no token.
- Every wait has a deadline, and the error names who was waited for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray

from slipstream.rollout.actors import PoolError, wait_for
from slipstream.rollout.stealing import plan_moves
from slipstream.rollout.types import Request, Rollout

POLL_HOLD_S = 2.0
"""How long a worker holds a poll that has nothing to say yet."""
CALL_TIMEOUT_S = 600.0
"""Deadline of short calls, which wait for one engine step at most."""


class Flight:
    """workers: actors of StreamingWorker with num_slots live requests each; steal: whether queued requests move."""

    def __init__(self, workers: Sequence[Any], names: Sequence[str], num_slots: int, steal: bool) -> None:
        self._workers, self._names = workers, names
        self._num_slots, self._steal = num_slots, steal
        self._held: list[dict[int, float]] = [{} for _ in workers]
        self._load = [0.0] * len(workers)
        self._polls: dict[Any, int] = {}
        self._num_stolen = 0

    @property
    def num_held(self) -> list[int]:
        """Requests that each worker holds."""
        return [len(held) for held in self._held]

    def least_loaded(self) -> int:
        """The worker with the fewest predicted tokens in flight."""
        return min(range(len(self._workers)), key=self._load.__getitem__)

    def assign(self, worker: int, uid: int, tokens: float) -> None:
        """`worker` holds the request from now on. tokens: expected response tokens."""
        self._held[worker][uid] = tokens
        self._load[worker] += tokens

    def _release(self, worker: int, uid: int) -> float:
        tokens = self._held[worker].pop(uid, None)
        if tokens is None:
            raise PoolError(f"{self._names[worker]} returned uid {uid}, which it does not hold")
        self._load[worker] -= tokens
        return tokens

    def submit(self, shares: Mapping[int, Sequence[Request]]) -> None:
        """Hands assigned requests to their workers."""
        refs = [self._workers[i].submit.remote(list(share), CALL_TIMEOUT_S) for i, share in shares.items()]
        wait_for(refs, [self._names[i] for i in shares], "handing out requests", CALL_TIMEOUT_S)

    def poll(self, wait_s: float, other: Sequence[Any] = ()) -> list[Rollout]:
        """What has finished, from all workers; waits up to `wait_s` for the first, or for one of `other`'s objects."""
        if self._steal:
            self._move()
        asked = set(self._polls.values())
        for i, worker in enumerate(self._workers):
            if i not in asked:
                self._polls[worker.poll.remote(POLL_HOLD_S)] = i
        answered, _ = ray.wait([*self._polls, *other], num_returns=1, timeout=wait_s)
        out: list[Rollout] = []
        for ref in answered:
            if ref not in self._polls:
                continue
            source = self._polls.pop(ref)
            for rollout in wait_for([ref], [self._names[source]], "rollouts", CALL_TIMEOUT_S)[0]:
                self._release(source, rollout.request.uid)
                out.append(rollout)
        return out

    def _move(self) -> None:
        """Idle workers get what others have queued. What has started since the last poll stays where it is."""
        moves = plan_moves(self.num_held, self._num_slots)
        if not moves:
            return
        wanted: dict[int, int] = defaultdict(int)
        for move in moves:
            wanted[move.source] += move.count
        refs = [self._workers[i].take_queued.remote(count, CALL_TIMEOUT_S) for i, count in wanted.items()]
        answers = wait_for(refs, [self._names[i] for i in wanted], "taking queued requests", CALL_TIMEOUT_S)
        taken: dict[int, list[Request]] = dict(zip(wanted, answers, strict=True))
        shares: dict[int, list[Request]] = defaultdict(list)
        for move in moves:
            mine, taken[move.source] = taken[move.source][: move.count], taken[move.source][move.count :]
            for request in mine:
                self.assign(move.target, request.uid, self._release(move.source, request.uid))
            shares[move.target] += mine
        self._num_stolen += sum(map(len, shares.values()))
        self.submit({i: share for i, share in shares.items() if share})

    def take_num_stolen(self) -> int:
        """How many requests have moved since the last call."""
        num_stolen, self._num_stolen = self._num_stolen, 0
        return num_stolen

    def abort(self, uids: Iterable[int]) -> None:
        """Takes requests out; what they have still comes from `poll`."""
        wanted = set(uids)
        shares = {i: sorted(wanted & held.keys()) for i, held in enumerate(self._held) if wanted & held.keys()}
        refs = [self._workers[i].abort.remote(share, CALL_TIMEOUT_S) for i, share in shares.items()]
        wait_for(refs, [self._names[i] for i in shares], "aborting requests", CALL_TIMEOUT_S)

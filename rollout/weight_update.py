"""How a version comes to all workers of a pool: everybody prepares, and only then does anybody serve it.

Invariants
- No worker serves a version before every block of it was verified, on every node that has a worker: by one worker
  where all map the same memory, by each where they do not. Everybody judges that by the receipts of all.
- A worker that cannot prepare ends the update with its name and the reason, and all go on with what they serve; one
  that dies is left out. What waits for an update that has ended is called off.
- Calls are chained: the learner's answer goes to the workers and their receipts go to all of them by Ray's references,
  while the caller only listens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.rollout.actors import PoolError, call_off, wait_until_ended
from slipstream.rollout.weight_handle import ComingHandle, Share, WeightHandle
from slipstream.rollout.weight_receiver import Receipt, unverified

LOOK_AFTER_S = 1.0
"""Longest time in which nobody is asked how things stand."""


@dataclass(frozen=True)
class WeightUpdate:
    """What one update did; receipts: by worker, of those that lived through it."""

    handle: WeightHandle
    receipts: dict[Any, Receipt]

    def metrics(self) -> dict[str, float]:
        """weights/bytes_sent: of the version's frame, once however many fetch it; weights/bytes_full: of all its
        tensors; weights/bytes_fetched: by all nodes; weights/whole_transfers: workers that needed a whole version."""
        fetched: dict[object, int] = {}
        shared = all(frame.payload.same_pages for frame in self.handle.frames)
        for i, receipt in enumerate(self.receipts.values()):
            # A node fetches a frame once: whoever needs most of them decides.
            place: object = receipt.node if shared else i
            fetched[place] = max(fetched.get(place, 0), receipt.num_bytes)
        return {
            "weights/bytes_full": float(self.handle.layout.num_bytes),
            "weights/bytes_sent": float(self.handle.frames[-1].num_bytes),
            "weights/bytes_fetched": float(sum(fetched.values())),
            "weights/whole_transfers": float(sum(receipt.whole for receipt in self.receipts.values())),
            "weights/prepare_s": max((receipt.seconds for receipt in self.receipts.values()), default=0.0),
        }


def deal_shares(nodes: Sequence[str]) -> list[Share]:
    """Of the workers on one node, each an equal share of the blocks. nodes: of every worker."""
    total, seen = Counter(nodes), Counter[str]()
    out = []
    for node in nodes:
        out.append(Share(seen[node], total[node]))
        seen[node] += 1
    return out


Gather = Callable[[Mapping[Any, Any], str, float], dict[Any, Any]]
"""Waits for Ray objects by worker: (objects, what they are, timeout_s). Who dies meanwhile may be left out."""


Commit = Callable[[Any, int, Sequence[Any]], Any]
"""Tells an actor to serve what it prepared: (actor, version, the receipts of all, or references to them); the call."""


def prepare_workers(
    actors: Mapping[Any, Any],
    nodes: Sequence[str],
    handle: WeightHandle | ComingHandle,
    commit: Commit,
    timeout_s: float,
    gather: Gather,
) -> tuple[WeightUpdate, dict[Any, Any]]:
    """All workers hold the version, verified; what they did, and the calls by which they serve it now, by worker.

    Raises what `gather` raises, or the handle's `wait`; all serve what they served then. actors: by worker; nodes: of
    each, in the same order.
    """
    asked = handle.ref if isinstance(handle, ComingHandle) else handle
    shares = zip(actors.items(), deal_shares(nodes), strict=True)
    refs = {worker: actor.prepare_policy.remote(asked, share, timeout_s) for (worker, actor), share in shares}
    commits: dict[Any, Any] = {}
    try:
        handle = handle.wait() if isinstance(handle, ComingHandle) else handle
        what, version = f"weights of version {handle.version}", handle.version
        # Each begins when Ray has all receipts, without a word from here: should one of them be an error, none begins.
        commits = {worker: commit(actor, version, list(refs.values())) for worker, actor in actors.items()}
        # To look at the receipts before they are done would take the cores that they need.
        wait_until_ended(list(commits.values()), LOOK_AFTER_S)
        receipts = gather(refs, what, timeout_s)
    except BaseException:
        call_off([*commits.values(), *refs.values()], LOOK_AFTER_S)
        raise
    # One that came late to its node fetched other frames than its neighbours, and one whose neighbour died has nobody
    # who verified the rest: they verify everything by themselves.
    again = [list(receipts)[i] for i in unverified(list(receipts.values()))]
    if again or len(receipts) < len(actors):
        call_off(list(commits.values()), LOOK_AFTER_S)
        refs = {worker: actors[worker].prepare_policy.remote(handle, Share(), timeout_s) for worker in again}
        verified = gather(refs, what, timeout_s)
        receipts = {worker: receipt for worker, receipt in receipts.items() if worker not in again} | verified
        commits = {worker: commit(actors[worker], version, list(receipts.values())) for worker in receipts}
    return WeightUpdate(handle, receipts), commits


def check_served(served: Mapping[Any, int], handle: WeightHandle) -> None:
    """PoolError naming the workers that do not serve the handle's version."""
    wrong = [f"{worker} serves {version}" for worker, version in served.items() if version != handle.version]
    if wrong:
        raise PoolError(f"weights: {', '.join(wrong)}, expected version {handle.version}")

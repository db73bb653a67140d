"""How a version comes to all workers of a pool: everybody prepares, and only then does anybody serve it.

Invariants
- No worker is told to serve a version before every block of it was verified, on every node that has a worker: by one
  worker where all map the same memory, by each where they do not.
- A worker that cannot prepare ends the update with its name and the reason, and all go on with what they serve; one
  that dies is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.rollout.actors import PoolError
from slipstream.rollout.weight_handle import FollowedPayload, Share, WeightHandle
from slipstream.rollout.weight_receiver import Receipt


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


def deal_shares(nodes: Sequence[str], most: int | None = None) -> list[Share]:
    """Of the workers on one node, the first `most` (all by default) an equal share of the blocks. nodes: of every
    worker."""
    total, seen = Counter(nodes), Counter[str]()
    out = []
    for node in nodes:
        of = min(total[node], most or total[node])
        out.append(Share(seen[node], of) if seen[node] < of else Share(0, 0))
        seen[node] += 1
    return out


def num_readers(handle: WeightHandle) -> int | None:
    """Of a node's workers, how many look at blocks; None: all. Who reads behind a writer takes the core and the memory
    that the copy needs; reading is the quicker of the two, so one reader for each writer keeps up with it."""
    followed = [frame.payload for frame in handle.frames if isinstance(frame.payload, FollowedPayload)]
    return min((payload.num_writers for payload in followed), default=None)


def unverified(receipts: Sequence[Receipt]) -> list[int]:
    """The workers to whom nobody can vouch for all blocks: judged by where they say they are, what they fetched and
    what they verified of it. Workers of a node vouch for each other where they fetched the same frames."""
    groups: dict[tuple[str, int], list[int]] = {}
    for i, receipt in enumerate(receipts):
        groups.setdefault((receipt.node, receipt.num_frames), []).append(i)
    out = []
    for members in groups.values():
        shares = {receipts[i].verified for i in members}
        of = max(share.of for share in shares)
        whole = of > 0 and {Share(nth, of) for nth in range(of)} <= shares
        out += [i for i in members if not whole and receipts[i].verified.of != 1]
    return sorted(out)


Gather = Callable[[Mapping[Any, Any], str, float], dict[Any, Any]]
"""Waits for Ray objects by worker: (objects, what they are, timeout_s). Who dies meanwhile may be left out."""


def prepare_workers(
    actors: Mapping[Any, Any], nodes: Sequence[str], handle: WeightHandle, timeout_s: float, gather: Gather
) -> WeightUpdate:
    """All workers hold the version, verified, and serve what they served. Raises what `gather` raises.

    actors: by worker; nodes: of each, in the same order.
    """
    what = f"weights of version {handle.version}"
    shares = zip(actors.items(), deal_shares(nodes, num_readers(handle)), strict=True)
    refs = {worker: actor.prepare_policy.remote(handle, share, timeout_s) for (worker, actor), share in shares}
    receipts = gather(refs, what, timeout_s)
    # One that came late to its node fetched other frames than its neighbours, and one whose neighbour died has nobody
    # who verified the rest: they verify everything by themselves.
    again = [list(receipts)[i] for i in unverified(list(receipts.values()))]
    refs = {worker: actors[worker].prepare_policy.remote(handle, Share(), timeout_s) for worker in again}
    verified = gather(refs, what, timeout_s)
    kept = {worker: receipt for worker, receipt in receipts.items() if worker not in again}
    return WeightUpdate(handle, kept | verified)


def check_served(served: Mapping[Any, int], handle: WeightHandle) -> None:
    """PoolError naming the workers that do not serve the handle's version."""
    wrong = [f"{worker} serves {version}" for worker, version in served.items() if version != handle.version]
    if wrong:
        raise PoolError(f"weights: {', '.join(wrong)}, expected version {handle.version}")

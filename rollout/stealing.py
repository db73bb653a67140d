"""Who gives queued requests to whom.

Invariants: pure; a worker gives only what waits in its queue and takes only what it can start at once, so that no
worker does both and no request moves twice for nothing; where a request runs changes no token.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Move:
    """`count` queued requests of worker `source` go to worker `target`."""

    source: int
    target: int
    count: int


def plan_moves(held: Sequence[int], num_slots: int) -> list[Move]:
    """One request at a time from the longest queue to the worker with the most free slots, until either is used up.

    held: [workers] requests of each, live and queued; num_slots: requests that a worker runs at once. A worker with
    more requests than slots has the rest queued; one with fewer has nothing queued and free slots. Of equal workers
    the first is chosen. O(requests moved * log workers).
    """
    queues = [(num_slots - count, i) for i, count in enumerate(held) if count > num_slots]
    rooms = [(count - num_slots, i) for i, count in enumerate(held) if count < num_slots]
    heapq.heapify(queues)
    heapq.heapify(rooms)
    moved: Counter[tuple[int, int]] = Counter()
    while queues and rooms:
        (queued, source), (room, target) = queues[0], rooms[0]
        moved[source, target] += 1
        for heap, left, worker in ((queues, queued + 1, source), (rooms, room + 1, target)):
            if left:
                heapq.heapreplace(heap, (left, worker))
            else:
                heapq.heappop(heap)
    return [Move(source, target, count) for (source, target), count in sorted(moved.items())]

"""The learner's end of weights in shared memory: copied and summed up in one pass, behind the caller's back.

Invariants
- `send` returns once the version has its place; its tensors are read until `settle` returns, and must not change
  before.
- A place is taken again only when nobody reads it: two of them serve a pool whose workers all follow, a worker that
  holds on to an old version costs one more.
- A version that could not be written to the end is never served: its turn is taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from slipstream.rollout.weight_handle import Layout, Payload, as_bytes
from slipstream.rollout.weight_segment import SegmentPayload, WritableSegment

NUM_PLACES = 3
"""Versions that must have room: what is served, what comes next, and one that somebody has not let go yet."""


class SegmentSender:
    """num_threads: that copy; node: this one's name."""

    verifies = True

    def __init__(self, num_threads: int, node: str) -> None:
        self._node, self._num_threads = node, num_threads
        self._threads = ThreadPoolExecutor(num_threads, "weights")
        self._places: list[WritableSegment] = []
        self._current: WritableSegment | None = None
        self._turn = 0
        self._copying: list[Future[None]] = []

    def send(self, name: str, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Payload:
        """Begins to copy CPU tensors."""
        self.settle()
        self._turn += 1
        if self._current is not None:
            # Before it may be closed: a number that the system gives out again would be another place's lock.
            self._current.release()
        place = self._current = self._take_place(layout)
        self._copying = [
            self._threads.submit(self._write, place, tensors, i, self._turn & 0xFFFFFFFF)
            for i in range(self._num_threads)
        ]
        return SegmentPayload(place.path, place.segment.identity, self._turn, self._node, layout, self._num_threads)

    def settle(self) -> None:
        """Waits until the last version is written."""
        copying, self._copying = self._copying, []
        for part in copying:
            part.result()

    def keep(self, payloads: list[Payload]) -> None:
        """Nothing to do: a place is free when nobody reads it."""

    def close(self) -> None:
        """No worker comes any more; who reads a version keeps it."""
        self.settle()
        self._threads.shutdown()
        for place in self._places:
            place.close()
        self._places.clear()

    def _take_place(self, layout: Layout) -> WritableSegment:
        for place in [one for one in self._places if one.segment.layout != layout]:
            place.close()
            self._places.remove(place)
        for place in self._places:
            if place is not self._current and place.take(self._turn):
                return place
        self._places.append(WritableSegment(layout))
        self._places[-1].take(self._turn)
        return self._places[-1]

    def _write(self, place: WritableSegment, tensors: Mapping[str, torch.Tensor], nth: int, stamp: int) -> None:
        """Every tensor that is thread nth's."""
        segment = place.segment
        try:
            for i, (spec, stream) in enumerate(zip(segment.layout.tensors, segment.streams(), strict=True)):
                if i % self._num_threads == nth:
                    stream.write(as_bytes(tensors[spec.key]).numpy(), stamp)
        except BaseException:
            segment.turn = 0
            raise


def has_room(num_bytes: int) -> bool:
    """Whether this node has memory for versions of so many bytes, for as long as a job runs."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    except OSError:
        return False
    return int(fields["MemAvailable"].split()[0]) * 1024 >= NUM_PLACES * num_bytes

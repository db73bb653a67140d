"""The learner's end of weights in shared memory: copied and summed up in one pass, behind the caller's back.

Invariants
- `send` returns once the version has its place; its tensors are read until `settle` returns, and must not change
  before.
- A place is taken again only when nobody reads it: two of them serve a pool whose workers all follow, a worker that
  holds on to an old version costs one more.
- A resident sender's tensors live in such a place themselves: the version that workers read is where it was made, and
  sending it is summing it up. Before they change they move on, to a place that nobody reads; the place that they live
  in is never taken for anything else.
- A version that could not be written to the end is never served: its turn is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from slipstream.kernels.block_stream import BlockStream
from slipstream.rollout.weight_handle import Layout, Payload, as_bytes
from slipstream.rollout.weight_segment import SegmentPayload, WritableSegment

NUM_PLACES = 3
"""Versions that must have room: what is served, what comes next, and one that somebody has not let go yet."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Home:
    """A place and the tensors in it, by TensorSpec.key, which somebody computes with."""

    place: WritableSegment
    tensors: Tensors

    @property
    def published(self) -> bool:
        """Whether its tensors are a version, and must not change."""
        return self.place.segment.turn != 0

    def holds(self, layout: Layout, tensors: Tensors) -> bool:
        """Whether these are its very tensors."""
        return layout == self.place.segment.layout and all(
            tensor.data_ptr() == tensors[key].data_ptr() and tensors[key].is_contiguous()
            for key, tensor in self.tensors.items()
            if tensor.nbytes
        )


class SegmentSender:
    """num_threads: that copy; node: this one's name; resident: see above, for CPU tensors that the caller lets move."""

    verifies = True

    def __init__(self, num_threads: int, node: str, resident: bool = False) -> None:
        self._node, self._num_threads, self._resident = node, num_threads, resident
        self._threads = ThreadPoolExecutor(num_threads, "weights")
        self._places: list[WritableSegment] = []
        self._current: WritableSegment | None = None
        self._home: Home | None = None
        self._next_home: WritableSegment | None = None
        self._turn = 0
        self._working: list[Future[None]] = []

    def send(self, name: str, layout: Layout, tensors: Tensors) -> Payload:
        """Begins to sum up CPU tensors that live here, or to copy others."""
        self._wait()
        self._turn += 1
        if self._next_home is not None:
            # A move that nobody has ended: what was copied may not be the newest any more.
            self._next_home.release()
            self._next_home = None
        if self._current is not None:
            # Before it may be closed: a number that the system gives out again would be another place's lock.
            self._current.release()
        home, stamp = self._home, self._turn & 0xFFFFFFFF
        if home is not None and not home.published and home.holds(layout, tensors):
            place = home.place
            place.segment.turn = self._turn
            self._begin(place, lambda nth, stream: stream.seal(stamp))
        else:
            place = self._take_place(layout, self._turn)
            sources = [as_bytes(tensors[spec.key]).numpy() for spec in layout.tensors]
            self._begin(place, lambda nth, stream: stream.write(sources[nth], stamp))
        self._current = place
        return SegmentPayload(place.path, place.segment.identity, self._turn, self._node, layout, self._num_threads)

    def room(self, layout: Layout) -> Tensors:
        """Tensors by TensorSpec.key in which the next version may be made: to send them is to sum them up."""
        self._wait()
        home = self._home
        if home is None or home.published or home.place.segment.layout != layout:
            return self._move_in(self._take_place(layout, 0))
        return home.tensors

    def begin_settle(self) -> None:
        """Begins the move that `settle` ends, where there is one to make."""
        if not self._resident or self._next_home is not None or (self._home and not self._home.published):
            return
        source = self._home.place if self._home else self._current
        if source is None:
            return
        if self._home is None:
            # Its first version may still be written.
            self._wait()
        place = self._next_home = self._take_place(source.segment.layout, 0)
        sources = [stream.data for stream in source.segment.streams()]
        self._begin(place, lambda nth, stream: stream.write(sources[nth], 0))

    def settle(self) -> Tensors:
        """Returns when the tensors sent last may change; by TensorSpec.key, where they live now if they have moved."""
        self.begin_settle()
        place, self._next_home = self._next_home, None
        self._wait()
        return {} if place is None else self._move_in(place)

    def _move_in(self, place: WritableSegment) -> Tensors:
        streams = zip(place.segment.layout.tensors, place.segment.streams(), strict=True)
        tensors = {spec.key: spec.view(torch.from_numpy(stream.data)) for spec, stream in streams}
        self._home = Home(place, tensors)
        return tensors

    def keep(self, payloads: list[Payload]) -> None:
        """Nothing to do: a place is free when nobody reads it."""

    def close(self) -> None:
        """No worker comes any more; who reads a version keeps it, and so does who lives there."""
        self._wait()
        self._threads.shutdown()
        for place in self._places:
            place.close()
        self._places.clear()

    def _wait(self) -> None:
        working, self._working = self._working, []
        for part in working:
            part.result()

    def _take_place(self, layout: Layout, turn: int) -> WritableSegment:
        for place in [one for one in self._places if one.segment.layout != layout]:
            place.close()
            self._places.remove(place)
            if self._home is not None and self._home.place is place:
                # Who computes with its tensors keeps them, but no version can be read from there any more.
                self._home = None
        home = self._home.place if self._home else None
        for place in self._places:
            if place not in (self._current, home, self._next_home) and place.take(turn):
                return place
        self._places.append(WritableSegment(layout))
        self._places[-1].take(turn)
        return self._places[-1]

    def _begin(self, place: WritableSegment, work: Callable[[int, BlockStream], None]) -> None:
        """work: on the nth tensor's blocks."""
        parts = range(self._num_threads)
        self._working += [self._threads.submit(self._work, place, work, part) for part in parts]

    def _work(self, place: WritableSegment, work: Callable[[int, BlockStream], None], part: int) -> None:
        try:
            for nth, stream in enumerate(place.segment.streams()):
                if nth % self._num_threads == part:
                    work(nth, stream)
        except BaseException:
            place.segment.turn = 0
            raise


def has_room(num_bytes: int) -> bool:
    """Whether this node has memory for versions of so many bytes, for as long as a job runs."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    except OSError:
        return False
    return int(fields["MemAvailable"].split()[0]) * 1024 >= NUM_PLACES * num_bytes

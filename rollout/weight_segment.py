"""Weights in memory that the learner and the workers of its node share: copied once, read while they are copied.

Invariants
- A segment is a file without a name, which others open through the writer's entry in /proc: whoever dies, nothing is
  left behind, and a writer that died is seen by the entry that is gone.
- It holds one version at a time. Who reads it holds a shared lock on it, which the kernel gives back when the process
  ends; it is written again only when nobody does, which an exclusive lock shows.
- The head names the segment and the version's turn, which is written under the exclusive lock: who holds the shared
  lock and sees the turn that the handle names reads that version and no other.
- Blocks are read behind the writer, by their stamps.
- What is handed out is mapped for reading only, and holds the lock for as long as it is referenced.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from slipstream.kernels.block_stream import ALIGN_BYTES, BlockStream, Stripes
from slipstream.rollout.weight_handle import Arrays, Layout, Share, WeightError, WeightsReplaced, mapped_tensor

NAME = "slipstream-weights"
HEAD_BYTES = 64
PAGE_BYTES = 4096
STRIPE_BYTES = 2 << 20
"""Workers of a node take turns in stripes of about so many bytes: what one reads the writer has just left."""
POLL_S = 0.001
LOOK_EVERY_S = 0.05
"""Between two looks at whether the writer lives."""


class Segment:
    """A version's bytes in memory: (turn, identity), sums, stamps, then the tensors, each from a multiple of 64 on."""

    def __init__(self, layout: Layout, memory: np.ndarray) -> None:
        """memory: flat uint8 [segment_bytes(layout)]."""
        self.layout, self._memory = layout, memory
        self._head = memory[:16].view(np.uint64)
        num = int(layout.offsets[-1])
        self._sums = memory[HEAD_BYTES : HEAD_BYTES + 8 * num].view(np.uint64)
        self._stamps = memory[HEAD_BYTES + 8 * num : HEAD_BYTES + 12 * num].view(np.uint32)

    @property
    def turn(self) -> int:
        """Of the version that it holds or that is being written; 0: none."""
        return int(self._head[0])

    @turn.setter
    def turn(self, turn: int) -> None:
        self._head[0] = turn

    @property
    def identity(self) -> int:
        """A number by chance: that a path leads to this very segment."""
        return int(self._head[1])

    @identity.setter
    def identity(self, identity: int) -> None:
        self._head[1] = identity

    def streams(self) -> Iterator[BlockStream]:
        """The blocks of every tensor, in the layout's order."""
        offsets, at = self.layout.offsets, _data_start(self.layout)
        for i, spec in enumerate(self.layout.tensors):
            part = slice(int(offsets[i]), int(offsets[i + 1]))
            data = self._memory[at : at + spec.num_bytes]
            yield BlockStream(data, self.layout.block_bytes, self._sums[part], self._stamps[part])
            at += _aligned(spec.num_bytes, ALIGN_BYTES)

    def arrays(self) -> dict[str, torch.Tensor]:
        """All tensors by TensorSpec.key, flat uint8."""
        # One call for all: every worker does this while the writer and the readers want the cores.
        specs, begin = self.layout.tensors, _data_start(self.layout)
        sizes = [size for spec in specs for size in (spec.num_bytes, -spec.num_bytes % ALIGN_BYTES)]
        parts = mapped_tensor(self._memory[begin:]).split_with_sizes(sizes)
        return {spec.key: part for spec, part in zip(specs, parts[::2], strict=True)}

    def follow(self, turn: int, share: Share, verify: bool, until: float, path: str) -> None:
        """Reads a share of the blocks behind the writer. until: of time.monotonic(); path: where the writer has it.
        WeightError names the block that does not match its checksum, or says why the others did not come."""
        offsets, stripe = self.layout.offsets, max(1, STRIPE_BYTES // self.layout.block_bytes)
        for i, stream in enumerate(self.streams()):
            stripes = Stripes(int(offsets[i]), stripe, share.nth, share.of)
            block, wrong = 0, False
            while block < len(stream.stamps):
                block, wrong = stream.follow(turn & 0xFFFFFFFF, verify, stripes, block, LOOK_EVERY_S)
                if wrong:
                    key, begin = self.layout.tensors[i].key, block * self.layout.block_bytes
                    raise WeightError(f"block {block} of {key!r} (from byte {begin}) does not match its checksum")
                if block < len(stream.stamps):
                    self._check_writer(turn, until, path)

    def _check_writer(self, turn: int, until: float, path: str) -> None:
        if self.turn != turn:
            raise WeightError("the learner could not write them to the end")
        if not os.path.exists(path):
            raise WeightError("the learner died while it wrote them")
        if time.monotonic() > until:
            raise WeightError("the learner did not write them in time")


@dataclass(frozen=True)
class SegmentPayload:
    """path: of the segment in the writer's /proc; identity, turn: in its head; node: where it lies;
    num_writers: threads that write it."""

    path: str
    identity: int
    turn: int
    node: str
    layout: Layout
    num_writers: int
    same_pages: ClassVar[bool] = True
    adoptable: ClassVar[bool] = True

    def receive(self, timeout_s: float) -> Arrays:
        """All tensors, mapped; `follow` says when they may be read."""
        return self._segment(timeout_s).arrays()

    def follow(self, share: Share, verify: bool, timeout_s: float) -> None:
        """Reads a share of the blocks behind the writer."""
        if not share.of:
            return
        until, segment = time.monotonic() + timeout_s, self._segment(timeout_s)
        try:
            segment.follow(self.turn, share, verify, until, self.path)
        except WeightError as error:
            raise WeightError(f"weights in shared memory: {error}") from error

    def _segment(self, timeout_s: float) -> Segment:
        """This version's, with a lease of its own."""
        try:
            lease = Lease(self.path, segment_bytes(self.layout), time.monotonic() + timeout_s)
        except OSError as error:
            raise WeightError(
                f"weights in the shared memory of node {self.node}: {type(error).__name__}: {error}; either their "
                "learner is gone, or this worker has no access to its /proc (weights.transport=object_store needs none)"
            ) from error
        segment = Segment(self.layout, np.asarray(lease))
        if segment.identity != self.identity or segment.turn != self.turn:
            raise WeightsReplaced("weights in shared memory: a newer version has taken their place")
        return segment


class Lease:
    """A segment's memory, readable, and the right to it: while any array of it is referenced nobody writes there.

    Raises OSError: no such file, another size, or still locked by the writer at `until` of time.monotonic().
    """

    def __init__(self, path: str, num_bytes: int, until: float) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, handle)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # The writer's exclusive lock lasts for as long as it takes to write the head.
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_S)
        self._mapped = _mapped(path, handle, num_bytes)
        address = np.frombuffer(self._mapped, np.uint8).ctypes.data
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": (num_bytes,),
            "data": (address, True),
        }


_MAPPED: dict[str, tuple[os.stat_result, mmap.mmap]] = {}
"""By path: a mapping made anew for every version would pay for all its pages again."""


def _mapped(path: str, handle: int, num_bytes: int) -> mmap.mmap:
    stat = os.fstat(handle)
    if stat.st_size != num_bytes:
        raise OSError(f"it has {stat.st_size} bytes, their layout asks for {num_bytes}")
    known = _MAPPED.get(path)
    if known is None or not os.path.samestat(known[0], stat):
        for old in [name for name in _MAPPED if name == path or not os.path.exists(name)]:
            del _MAPPED[old]
        # mmap keeps a copy of the handle it is given, and that one would keep the lock.
        own = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            known = _MAPPED[path] = stat, mmap.mmap(own, num_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(own)
    return known[1]


class WritableSegment:
    """One segment from the writer's side."""

    def __init__(self, layout: Layout) -> None:
        self._handle = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(self._handle, segment_bytes(layout))
        memory = mmap.mmap(self._handle, segment_bytes(layout))
        with contextlib.suppress(OSError):  # a kernel without huge pages for shared memory
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.segment = Segment(layout, np.frombuffer(memory, np.uint8))
        self.segment.identity = secrets.randbits(64)

    @property
    def path(self) -> str:
        """Where other processes of the same user and node open it."""
        return f"/proc/{os.getpid()}/fd/{self._handle}"

    def take(self, turn: int) -> bool:
        """Makes it the place of the version with that turn, unless somebody reads what it holds."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.segment.turn = turn
        # From here on it is kept for whoever comes, until `release`.
        fcntl.flock(self._handle, fcntl.LOCK_SH)
        return True

    def release(self) -> None:
        """Once nobody reads it any more, it may be taken for another version."""
        fcntl.flock(self._handle, fcntl.LOCK_UN)

    def close(self) -> None:
        """No new reader finds it; who has mapped it keeps it."""
        os.close(self._handle)


def segment_bytes(layout: Layout) -> int:
    """Of the file that holds a version."""
    return _data_start(layout) + sum(_aligned(spec.num_bytes, ALIGN_BYTES) for spec in layout.tensors)


def _data_start(layout: Layout) -> int:
    return _aligned(HEAD_BYTES + 12 * int(layout.offsets[-1]), PAGE_BYTES)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to

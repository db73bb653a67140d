"""What a version of the weights is: its layout, its frames, and how the bytes that arrived are judged.

Invariants
- A handle is enough to serve its version, whatever a worker holds: its first frame is whole, each later one holds the
  blocks that changed since the one before. A worker that holds one of these versions needs the frames after it only.
- Tensors lie in blocks of block_bytes, the last of a tensor may be shorter; every block that travels has a checksum,
  and every frame the digest of all blocks of its version.
- Bytes are judged before anybody serves them: wrong names or sizes, a block that does not match its checksum and blocks
  that do not add up to the digest are a WeightError.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch

from slipstream.kernels.checksum import block_checksums, num_blocks
from slipstream.rollout.engine import EngineError

Part = Literal["policy", "speculator"]
Arrays = Mapping[str, torch.Tensor]
"""Flat uint8 tensors by TensorSpec.key: of each tensor the blocks that travel, one behind the other."""


class WeightError(EngineError):
    """Weights that cannot be served: lost, torn, corrupt, or of another model. What was served before still is."""


class WeightsReplaced(WeightError):
    """A newer version has taken the place of the one that the handle names."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a part. dtype: torch's name for it."""

    part: Part
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def key(self) -> str:
        """Its name among all parts."""
        return f"{self.part}/{self.name}"

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor in its bytes (flat uint8, whole)."""
        return data.view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of all versions with the same model, and their blocks, counted through all tensors."""

    tensors: tuple[TensorSpec, ...]
    block_bytes: int

    # A handle goes to every worker, version after version: what is in it more than once is made once.
    def __reduce__(self) -> tuple[Any, ...]:
        return _layout_from, (self._text,)

    @cached_property
    def _text(self) -> str:
        return json.dumps([self.block_bytes, [[getattr(spec, name) for name in _FIELDS] for spec in self.tensors]])

    @cached_property
    def policy_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the policy's tensors, by name."""
        return {spec.name: spec.shape for spec in self.tensors if spec.part == "policy"}

    @property
    def num_bytes(self) -> int:
        """Bytes of a whole version."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @cached_property
    def offsets(self) -> np.ndarray:
        """The first block of every tensor, and the number of all: int64 [T + 1]."""
        counts = [num_blocks(tensor.num_bytes, self.block_bytes) for tensor in self.tensors]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def split(self, blocks: np.ndarray) -> list[np.ndarray]:
        """Ascending block numbers as one array of numbers within each tensor."""
        offsets = self.offsets
        parts = np.split(blocks, np.searchsorted(blocks, offsets[1:-1]))
        return [part - first for part, first in zip(parts, offsets[:-1], strict=True)]

    def sent_bytes(self, tensor: int, blocks: np.ndarray) -> int:
        """Bytes of some blocks (numbers within the tensor, ascending)."""
        if not len(blocks):
            return 0
        size, last = self.tensors[tensor].num_bytes, int(blocks[-1])
        return (len(blocks) - 1) * self.block_bytes + min(self.block_bytes, size - last * self.block_bytes)


_FIELDS = ("part", "name", "dtype", "shape", "num_bytes")


@lru_cache(maxsize=8)
def _layout_from(text: str) -> Layout:
    block_bytes, specs = json.loads(text)
    return Layout(
        tuple(TensorSpec(p, name, dtype, tuple(shape), size) for p, name, dtype, shape, size in specs), block_bytes
    )


@dataclass(frozen=True, slots=True)
class Share:
    """The nth of `of` equal parts of the blocks, none if `of` is 0: a node's workers look at them for each other."""

    nth: int = 0
    of: int = 1

    def limits(self, count: int) -> tuple[int, int]:
        """First and last + 1 of `count` blocks."""
        if not self.of:
            return 0, 0
        return count * self.nth // self.of, count * (self.nth + 1) // self.of

    def within(self, most: int | None) -> Share:
        """The share of the same worker where only the first `most` of its node look at blocks; None: all do."""
        of = self.of if most is None else min(self.of, most)
        return Share(self.nth, of) if self.nth < of else Share(0, 0)


class Payload(Protocol):
    """Where the bytes of a frame are. Travels to every worker, so it is small.

    same_pages: all workers of a node map the same memory, so that one look at it is enough for all of them.
    adoptable: what `receive` returns is never written by anybody while it is referenced.
    """

    @property
    def same_pages(self) -> bool:
        """See above."""

    @property
    def adoptable(self) -> bool:
        """See above."""

    def receive(self, timeout_s: float) -> Arrays:
        """The bytes; WeightError when they are lost, torn or late."""


@runtime_checkable
class FollowedPayload(Payload, Protocol):
    """One whose bytes are still being written when they are received, whole versions only; the frame holds no
    checksums. It verifies by itself. num_writers: threads that write them, so many readers keep up with them."""

    @property
    def num_writers(self) -> int:
        """See above."""

    def follow(self, share: Share, verify: bool, timeout_s: float) -> None:
        """Returns when a share of the blocks is there and, if `verify`, matches its checksums; else WeightError."""


def is_followed(payload: Payload) -> TypeGuard[FollowedPayload]:
    """As isinstance, which takes a tenth of a millisecond for a protocol."""
    return hasattr(payload, "follow")


@dataclass(frozen=True)
class Frame:
    """A version, whole or as a change. blocks: the numbers of the blocks in the payload, None for all; checksums: of
    these blocks, uint64, empty if nothing is to be verified; digest: of all blocks of the version; num_bytes: sent."""

    version: int
    blocks: np.ndarray | None
    checksums: np.ndarray
    digest: int
    num_bytes: int
    payload: Payload

    def numbers(self, layout: Layout) -> np.ndarray:
        """The numbers of the blocks in the payload."""
        return np.arange(layout.offsets[-1]) if self.blocks is None else self.blocks


@dataclass(frozen=True)
class WeightHandle:
    """One version of all parts. Valid while it is the newest; may be given to any worker, at any time, again."""

    layout: Layout
    frames: tuple[Frame, ...]
    verify: bool = True

    @property
    def version(self) -> int:
        """What whoever applies all frames serves."""
        return self.frames[-1].version

    def frames_after(self, held: Held | None) -> tuple[Frame, ...]:
        """What is missing to a worker that holds `held`: from the first frame on if that is none of these versions."""
        if held is None or held.layout != self.layout:
            return self.frames
        known = [i for i, frame in enumerate(self.frames) if frame.digest == held.digest]
        return self.frames[known[-1] + 1 :] if known else self.frames


@dataclass(frozen=True)
class ComingHandle:
    """A handle that the learner is about to give. ref: Ray's, for the workers; wait: gives it, or raises."""

    ref: Any
    wait: Callable[[], WeightHandle]


def num_readers(handle: WeightHandle) -> int | None:
    """Of a node's workers, how many look at blocks; None: all. Who reads behind a writer takes the core and the memory
    that the copy needs; reading is the quicker of the two, so one reader for each writer keeps up with it."""
    followed = [frame.payload for frame in handle.frames if is_followed(frame.payload)]
    return min((payload.num_writers for payload in followed), default=None)


@dataclass(frozen=True)
class Held:
    """What a worker serves: the checksums of all its blocks, uint64, and their digest."""

    layout: Layout
    checksums: np.ndarray
    digest: int


def digest_of(checksums: np.ndarray) -> int:
    """One number for all blocks: the checksum of their checksums."""
    data = torch.from_numpy(np.ascontiguousarray(checksums).view(np.uint8))
    return int(block_checksums(data, max(1, len(data)))[0]) if len(data) else 0


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory, flat uint8; a copy only where it does not lie in one piece."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


# torch has no read-only tensors. What is mapped is read by models, or copied, and never written: whoever adopts it
# makes a copy before any change (see WeightTable).
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)


def mapped_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over memory that others map too. Nobody may write to it."""
    return torch.from_numpy(array)


def check_arrays(layout: Layout, frame: Frame, arrays: Arrays) -> None:
    """WeightError naming a tensor that is missing, unknown or of the wrong size."""
    where = f"weights of version {frame.version}"
    per_tensor = layout.split(frame.numbers(layout))
    wanted = {spec.key: layout.sent_bytes(i, per_tensor[i]) for i, spec in enumerate(layout.tensors)}
    for key in sorted(set(arrays) - set(wanted)):
        raise WeightError(f"{where}: {key!r} came, which is not in their layout")
    for key, size in wanted.items():
        if size and key not in arrays:
            raise WeightError(f"{where}: {key!r} did not arrive")
        if size and len(arrays[key]) != size:
            raise WeightError(f"{where}: {len(arrays[key])} bytes of {key!r} arrived, {size} were sent")


def verify_blocks(layout: Layout, frame: Frame, arrays: Arrays, begin: int, end: int, num_threads: int = 1) -> None:
    """Compares the payload's blocks begin to end - 1 with their checksums; WeightError names the first that differs."""
    first = 0
    for i, numbers in enumerate(layout.split(frame.numbers(layout))):
        low, high = max(begin, first) - first, min(end, first + len(numbers)) - first
        if low < high:
            key, size = layout.tensors[i].key, layout.block_bytes
            found = block_checksums(arrays[key][low * size : high * size], size, num_threads)
            wrong = np.flatnonzero(found != frame.checksums[first + low : first + high])
            if len(wrong):
                block = int(numbers[low + wrong[0]])
                raise WeightError(
                    f"weights of version {frame.version}: block {block} of {key!r} (from byte {block * size}) does "
                    "not match its checksum"
                )
        first += len(numbers)


def advance(layout: Layout, held: Held | None, frames: Sequence[Frame]) -> Held:
    """What a worker holds after these frames; WeightError if the blocks do not add up to a version's digest."""
    checksums = np.zeros(layout.offsets[-1], np.uint64) if held is None else held.checksums.copy()
    digest = 0 if held is None else held.digest
    for frame in frames:
        checksums[frame.numbers(layout)] = frame.checksums
        digest = digest_of(checksums)
        if digest != frame.digest:
            raise WeightError(f"weights of version {frame.version}: their blocks do not add up to the version's digest")
    return Held(layout, checksums, digest)

"""What a worker does with a handle: fetch and judge first, then change all parts between two engine steps.

Invariants
- `prepare` changes nothing that is served, and may run while the engine steps; `commit` changes all parts or, where it
  raises, none: whatever can be wrong with bytes, names and shapes was found out by `prepare`.
- `prepare` verifies its share, as one of a node's workers. `commit` is given the receipts of all workers that prepared,
  and is refused unless these show that every block was verified for each of them, and its own is among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slipstream.rollout.engine import Patch
from slipstream.rollout.weight_handle import (
    Arrays,
    Frame,
    Held,
    Share,
    WeightError,
    WeightHandle,
    WeightsReplaced,
    advance,
    check_arrays,
    is_followed,
    num_readers,
    verify_blocks,
)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `prepare` did. node: where; num_frames, num_bytes: fetched; whole: from a whole version on; verified: the
    share of each frame's blocks."""

    node: str
    version: int
    num_frames: int
    num_bytes: int
    whole: bool
    verified: Share
    seconds: float


@dataclass(frozen=True)
class _Prepared:
    """What `commit` hands to the engine: nothing is left to be done then but that."""

    handle: WeightHandle
    policy: Mapping[str, torch.Tensor]
    draft: Mapping[str, torch.Tensor]
    patches: Sequence[Mapping[str, Patch]]
    adopt: bool


REPLACED = -1
"""What a worker answers that was told to serve a version which is not to be had any more."""


class WeightReceiver:
    """One engine's end of the transfer. node: a name that workers with the same memory have in common."""

    def __init__(self, engine: Any, node: Callable[[], str], num_threads: int = 1) -> None:
        self._engine, self._node, self._num_threads = engine, node, num_threads
        self._held: Held | None = None
        self._prepared: tuple[_Prepared, Held | None, Receipt] | None = None
        self._committed: int | None = None

    def prepare(self, handle: WeightHandle, share: Share, timeout_s: float) -> Receipt:
        """Fetches what is missing and verifies a share of it. WeightError or EngineError: nothing has changed.

        share: which one of how many workers of its node this is.
        """
        started = time.perf_counter()
        self._prepared = self._committed = None
        layout, version, share = handle.layout, handle.version, share.within(num_readers(handle))
        self._engine.check_policy(layout.policy_shapes, version)
        frames = handle.frames_after(self._held)
        arrays = tuple(frame.payload.receive(timeout_s) for frame in frames)
        whole = bool(frames) and frames[0].blocks is None
        followed = [frame.payload for frame in frames if is_followed(frame.payload)]
        held = None
        for frame, received in zip(frames, arrays, strict=True):
            if not followed:
                check_arrays(layout, frame, received)
            if not frame.payload.same_pages:
                share = Share()
        prepared = _unpacked(handle, frames, arrays)
        for payload in followed:
            payload.follow(share, handle.verify, timeout_s)
        if handle.verify and not followed:
            held = advance(layout, None if whole else self._held, frames)
            for frame, received in zip(frames, arrays, strict=True):
                verify_blocks(layout, frame, received, *share.limits(len(frame.checksums)), self._num_threads)
        num_bytes = sum(frame.num_bytes for frame in frames)
        seconds = time.perf_counter() - started
        receipt = Receipt(self._node(), version, len(frames), num_bytes, whole, share, seconds)
        self._prepared = prepared, held, receipt
        return receipt

    def prepare_alone(self, handle: WeightHandle, timeout_s: float) -> Receipt | None:
        """As `prepare` for a worker that nobody vouches for; None: a newer version has taken the handle's place."""
        try:
            return self.prepare(handle, Share(), timeout_s)
        except WeightsReplaced:
            return None

    def commit(self, version: int, receipts: Sequence[Receipt]) -> int:
        """Serves what was prepared; the version. Only between two engine steps. receipts: of all who prepared it.
        WeightError, and nothing has changed: it was not prepared, or they leave blocks that nobody verified."""
        if self._prepared is None and self._committed == version:
            # Told once more, because a neighbour died in between.
            return version
        prepared, held = self._ready(version, receipts)
        if prepared.draft:
            # First: a draft of another version than the policy costs acceptance, never a token.
            self._engine.update_draft(prepared.draft, version)
        self._prepared = self._held = None
        self._engine.update_policy(prepared.policy, version, adopt=prepared.adopt, patches=prepared.patches)
        self._held, self._committed = held, version
        return version

    def _ready(self, version: int, receipts: Sequence[Receipt]) -> tuple[_Prepared, Held | None]:
        if self._prepared is None or self._prepared[0].handle.version != version:
            raise WeightError(f"weights of version {version} were not prepared")
        prepared, held, receipt = self._prepared
        if receipt not in receipts or unverified(receipts) or any(other.version != version for other in receipts):
            raise WeightError(f"weights of version {version}: nobody has verified all blocks for every worker")
        return prepared, held


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


def _unpacked(handle: WeightHandle, frames: Sequence[Frame], arrays: Sequence[Arrays]) -> _Prepared:
    policy: dict[str, torch.Tensor] = {}
    draft: dict[str, torch.Tensor] = {}
    patches: list[Mapping[str, Patch]] = []
    for frame, received in zip(frames, arrays, strict=True):
        draft = _tensors(handle, received, "speculator") or draft
        if frame.blocks is None:
            policy = _tensors(handle, received, "policy")
        else:
            patches.append(_patches(handle, frame, received))
    return _Prepared(handle, policy, draft, patches, bool(frames) and frames[0].payload.adoptable)


def _tensors(handle: WeightHandle, arrays: Arrays, part: str) -> dict[str, torch.Tensor]:
    """The part's tensors, where the frame holds any of it: a speculator travels whole or not at all."""
    specs = [spec for spec in handle.layout.tensors if spec.part == part]
    empty = torch.empty(0, dtype=torch.uint8)
    if not any(spec.key in arrays for spec in specs):
        return {}
    return {spec.name: spec.view(arrays.get(spec.key, empty)) for spec in specs}


def _patches(handle: WeightHandle, frame: Frame, arrays: Arrays) -> dict[str, Patch]:
    layout, out = handle.layout, {}
    for spec, numbers in zip(layout.tensors, layout.split(frame.numbers(layout)), strict=True):
        if spec.part == "policy" and len(numbers):
            dtype: torch.dtype = getattr(torch, spec.dtype)
            out[spec.name] = Patch(numbers, arrays[spec.key], dtype, layout.block_bytes // dtype.itemsize)
    return out

"""What a worker does with a handle: fetch and judge first, then change all parts between two engine steps.

Invariants
- `prepare` changes nothing that is served, and may run while the engine steps; `commit` changes all parts or, where it
  raises, none: whatever can be wrong with bytes, names and shapes was found out by `prepare`.
- `prepare` verifies the share it is told. That the others of its node have verified the rest of the same memory is the
  caller's knowledge: who commits after a share of less than all vouches for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from slipstream.rollout.engine import Patch
from slipstream.rollout.weight_handle import (
    Arrays,
    FollowedPayload,
    Frame,
    Held,
    Share,
    WeightError,
    WeightHandle,
    WeightsReplaced,
    advance,
    check_arrays,
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
    held: Held | None = None


REPLACED = -1
"""What a worker answers that was told to serve a version which is not to be had any more."""


class WeightReceiver:
    """One engine's end of the transfer. node: a name that workers with the same memory have in common."""

    def __init__(self, engine: Any, node: Callable[[], str], num_threads: int = 1) -> None:
        self._engine, self._node, self._num_threads = engine, node, num_threads
        self._held: Held | None = None
        self._prepared: _Prepared | None = None

    def prepare(self, handle: WeightHandle, share: Share, timeout_s: float) -> Receipt:
        """Fetches what is missing and verifies a share of it. WeightError or EngineError: nothing has changed."""
        started = time.perf_counter()
        self._prepared = None
        layout, version = handle.layout, handle.version
        shapes = {spec.name: spec.shape for spec in layout.tensors if spec.part == "policy"}
        self._engine.check_policy(shapes, version)
        frames = handle.frames_after(self._held)
        arrays = tuple(frame.payload.receive(timeout_s) for frame in frames)
        whole = bool(frames) and frames[0].blocks is None
        followed = [frame.payload for frame in frames if isinstance(frame.payload, FollowedPayload)]
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
        self._prepared = replace(prepared, held=held)
        num_bytes = sum(frame.num_bytes for frame in frames)
        return Receipt(self._node(), version, len(frames), num_bytes, whole, share, time.perf_counter() - started)

    def prepare_alone(self, handle: WeightHandle, timeout_s: float) -> bool:
        """As `prepare` for a worker that nobody vouches for; False: a newer version has taken the handle's place."""
        try:
            self.prepare(handle, Share(), timeout_s)
        except WeightsReplaced:
            return False
        return True

    def commit(self, version: int) -> int:
        """Serves what was prepared; the version. Only between two engine steps, and only if all of it is verified."""
        prepared = self._ready(version)
        if prepared.draft:
            # First: a draft of another version than the policy costs acceptance, never a token.
            self._engine.update_draft(prepared.draft, version)
        self._prepared = self._held = None
        self._engine.update_policy(prepared.policy, version, adopt=prepared.adopt, patches=prepared.patches)
        self._held = prepared.held
        return version

    def _ready(self, version: int) -> _Prepared:
        if self._prepared is None or self._prepared.handle.version != version:
            raise WeightError(f"weights of version {version} were not prepared")
        return self._prepared


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

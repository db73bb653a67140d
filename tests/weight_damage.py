"""Weights that were changed on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from slipstream.kernels.block_stream import BlockStream
from slipstream.rollout.weight_handle import FollowedPayload, WeightHandle, digest_of
from slipstream.trainer.weight_segment import SegmentSender
from slipstream.trainer.weight_sync import WeightPublisher


def torn(handle: WeightHandle) -> WeightHandle:
    """The last block is not what was sent."""
    frame = handle.frames[-1]
    sums = frame.checksums.copy()
    sums[-1] ^= np.uint64(1)
    return replace(handle, frames=(replace(frame, checksums=sums, digest=digest_of(sums)),))


def stream_of(publisher: WeightPublisher, handle: WeightHandle, key: str) -> BlockStream:
    """The blocks of a tensor of the newest version in shared memory, where they may be written."""
    sender = publisher._sender
    assert isinstance(sender, SegmentSender)
    assert sender._current is not None
    keys = [spec.key for spec in handle.layout.tensors]
    return list(sender._current.segment.streams())[keys.index(key)]


@contextmanager
def damaged_version(publisher: WeightPublisher, handle: WeightHandle) -> Iterator[WeightHandle]:
    """The newest version with something wrong in its last block; afterwards it is right again."""
    publisher.settle()
    if not isinstance(handle.frames[-1].payload, FollowedPayload):
        yield torn(handle)
        return
    stream = stream_of(publisher, handle, handle.layout.tensors[-1].key)
    stream.data[-1] ^= 1
    yield handle
    stream.data[-1] ^= 1

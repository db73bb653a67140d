"""Weights in shared memory: read behind the copy, never written under a reader, gone with the processes."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.kernels.block_stream import ALIGN_BYTES, BlockStream, Stripes, numpy_follow, numpy_write
from slipstream.kernels.checksum import num_blocks, numpy_block_checksums
from slipstream.rollout.weight_handle import (
    FollowedPayload,
    Share,
    WeightError,
    WeightHandle,
    WeightsReplaced,
    num_readers,
)
from slipstream.rollout.weight_segment import SegmentPayload, WritableSegment
from slipstream.trainer.weight_segment import SegmentSender, has_room
from slipstream.trainer.weight_sync import WeightPublisher, WeightSpec, layout_of
from tests.weight_damage import damaged_version, stream_of

BLOCK, DEADLINE_S = 1024, 30.0
Weights = dict[str, torch.Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


@pytest.fixture
def sender() -> Iterator[WeightPublisher]:
    publisher = WeightPublisher(WeightSpec("shared_memory", block_bytes=BLOCK, num_threads=4))
    yield publisher
    publisher.close()


def weights(seed: int, num: int = 3) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(700 + 300 * i, generator=generator) for i in range(num)}


def fetch(handle: WeightHandle, share: Share | None = None, timeout_s: float = DEADLINE_S) -> Weights:
    payload = handle.frames[0].payload
    assert isinstance(payload, FollowedPayload)
    arrays = payload.receive(timeout_s)
    payload.follow(share or Share(), handle.verify, timeout_s)
    return {spec.name: spec.view(arrays[spec.key]) for spec in handle.layout.tensors}


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def num_places(publisher: WeightPublisher) -> int:
    assert isinstance(publisher._sender, SegmentSender)
    return len(publisher._sender._places)


# ---- streams


def stream(size: int, block_bytes: int) -> BlockStream:
    memory = np.zeros(size + ALIGN_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGN_BYTES
    num = num_blocks(size, block_bytes)
    return BlockStream(memory[start : start + size], block_bytes, np.zeros(num, np.uint64), np.zeros(num, np.uint32))


@given(st.integers(0, 5000), st.sampled_from([64, 1024, 4096]), st.integers(1, 2**32 - 1), st.data())
def test_the_twins_agree(size: int, block_bytes: int, stamp: int, data: st.DataObject) -> None:
    source = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    native, plain = stream(size, block_bytes), stream(size, block_bytes)
    native.write(source, stamp)
    numpy_write(plain, source, stamp)
    for one in (native, plain):
        np.testing.assert_array_equal(one.data, source)
        np.testing.assert_array_equal(one.sums, numpy_block_checksums(source, block_bytes))
        assert set(one.stamps.tolist()) <= {stamp}
    native.data[:] = source[::-1]
    native.seal(stamp)
    np.testing.assert_array_equal(native.sums, numpy_block_checksums(source[::-1].copy(), block_bytes))
    native.write(source, stamp)
    of = data.draw(st.integers(1, 3))
    stripes = Stripes(data.draw(st.integers(0, 9)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, of - 1)), of)
    if size:
        place = data.draw(st.integers(0, size - 1))
        native.data[place] ^= 1
        if data.draw(st.booleans()):
            native.stamps[data.draw(st.integers(0, len(native.stamps) - 1))] ^= 1
    for verify in (True, False):
        for begin in range(0, len(native.stamps) + 1, 3):
            expected = numpy_follow(native, stamp, verify, stripes, begin, 0.0)
            assert native.follow(stamp, verify, stripes, begin, 0.0) == expected


def test_stripes_divide_all_blocks() -> None:
    for of in (1, 2, 5):
        held = [Stripes(7, 3, nth, of).hold(block) for block in range(40) for nth in range(of)]
        assert sum(held) == 40


def test_a_target_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="as large"):
        stream(100, 64).write(np.zeros(99, np.uint8), 1)
    with pytest.raises(ValueError, match="64 must divide"):
        stream(100, 100).write(np.zeros(100, np.uint8), 1)


# ---- versions


def test_versions_take_turns_in_two_places(sender: WeightPublisher) -> None:
    held: Weights = {}
    for version in range(1, 8):
        handle = sender.publish({"policy": weights(version)}, version)
        held = fetch(handle)
        assert same(held, weights(version))
    assert num_places(sender) == 2


def test_what_somebody_reads_is_not_written(sender: WeightPublisher) -> None:
    first = fetch(sender.publish({"policy": weights(1)}, 1))
    part = first.pop("w2")[5:9]
    first.clear()
    for version in range(2, 7):
        fetch(sender.publish({"policy": weights(version)}, version))
    assert torch.equal(part, weights(1)["w2"][5:9]), "one slice keeps the whole version"
    assert num_places(sender) == 3
    del part
    for version in range(7, 10):
        fetch(sender.publish({"policy": weights(version)}, version))
    assert num_places(sender) == 3


def test_nobody_can_write_what_he_was_given(sender: WeightPublisher) -> None:
    handle = sender.publish({"policy": weights(1)}, 1)
    tensor = fetch(handle)["w0"]
    child = os.fork()
    if child == 0:
        tensor.fill_(0.0)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV
    assert same(fetch(handle), weights(1))


def test_a_version_whose_place_was_taken_says_so(sender: WeightPublisher) -> None:
    handle = sender.publish({"policy": weights(1)}, 1)
    sender.publish({"policy": weights(2)}, 2)
    assert same(fetch(handle), weights(1)), "the version before is there until its place is needed"
    sender.publish({"policy": weights(3)}, 3)
    with pytest.raises(WeightsReplaced, match="newer version"):
        fetch(handle)


def is_kept(handle: WeightHandle) -> bool:
    """Whether somebody's lock keeps the version from being written over."""
    payload = handle.frames[0].payload
    assert isinstance(payload, SegmentPayload)
    other = os.open(payload.path, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(other)
    return False


def test_the_newest_version_is_kept_for_whoever_comes(sender: WeightPublisher) -> None:
    first = sender.publish({"policy": weights(1)}, 1)
    assert is_kept(first)
    second = sender.publish({"policy": weights(2)}, 2)
    assert is_kept(second)
    assert not is_kept(first)


def test_another_layout_has_places_of_its_own(sender: WeightPublisher) -> None:
    old = sender.publish({"policy": weights(1)}, 1)
    handle = sender.publish({"policy": weights(2, num=5)}, 2)
    assert is_kept(handle), "the old place's lock went, not the new one's"
    assert same(fetch(handle), weights(2, num=5))
    assert num_places(sender) == 1
    with pytest.raises(WeightError):
        fetch(old)


def test_every_share_sees_its_stripes_and_all_shares_see_everything() -> None:
    # Large: a share is several stripes.
    sender = WeightPublisher(WeightSpec("shared_memory", block_bytes=1 << 16))
    big = {"a": torch.arange(1 << 20, dtype=torch.float32), "b": torch.arange(3 << 18, dtype=torch.float64)}
    handle = sender.publish({"policy": big}, 1)
    sender.settle()
    for key, at in (("policy/a", 5), ("policy/b", -1)):
        data = stream_of(sender, handle, key).data
        data[at] ^= 1
        failed = []
        for nth in range(4):
            try:
                fetch(handle, Share(nth, 4))
            except WeightError as error:
                failed.append(str(error))
        data[at] ^= 1
        assert len(failed) == 1
        assert key in failed[0]
    assert same(fetch(handle), big)
    sender.close()


def test_as_many_workers_read_as_threads_write() -> None:
    for num_threads, readers in ((1, 1), (2, 1), (4, 2)):
        sender = WeightPublisher(WeightSpec("shared_memory", num_threads=num_threads))
        handle = sender.publish({"policy": weights(1)}, 1)
        assert num_readers(handle) == readers
        with damaged_version(sender, handle):
            assert fetch(handle, Share(0, 0)).keys() == weights(1).keys(), "no share, nothing to find"
        sender.close()


def test_damage_is_found_and_named(sender: WeightPublisher) -> None:
    handle = sender.publish({"policy": weights(1)}, 1)
    with (
        damaged_version(sender, handle),
        pytest.raises(WeightError, match=r"block 5 of 'policy/w2' \(from byte 5120\)"),
    ):
        fetch(handle)
    assert same(fetch(handle), weights(1))
    with damaged_version(sender, handle):
        fetch(replace(handle, verify=False))


# ---- weights that live where they are read


@pytest.fixture
def resident() -> Iterator[WeightPublisher]:
    publisher = WeightPublisher(WeightSpec("shared_memory", block_bytes=BLOCK, num_threads=4, resident=True))
    yield publisher
    publisher.close()


def settled(publisher: WeightPublisher, tensors: Weights) -> Weights:
    """What their owner goes on with."""
    moved = publisher.settle()
    return {name: moved.get(f"policy/{name}", tensor) for name, tensor in tensors.items()}


def test_resident_weights_are_read_where_they_were_made(resident: WeightPublisher) -> None:
    tensors, versions = weights(0), dict[int, Weights]()
    for version in range(1, 8):
        if version > 2:
            # A place is kept for as long as its version is.
            del versions[version - 2]
        tensors = settled(resident, tensors)
        for tensor in tensors.values():
            tensor.add_(1.0)
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        handle = resident.publish({"policy": tensors}, version)
        versions[version] = fetch(handle)
        assert same(versions[version], expected)
        if version > 1:
            stream_of(resident, handle, "policy/w0").data[:4] ^= 1
            assert not torch.equal(tensors["w0"], expected["w0"]), "there is no copy of it"
            stream_of(resident, handle, "policy/w0").data[:4] ^= 1
            assert torch.equal(versions[version - 1]["w1"] + 1.0, expected["w1"]), "the version before is what it was"
    assert num_places(resident) == 2, "what is read, and where the weights live"


def test_resident_weights_survive_versions_that_nobody_changed(resident: WeightPublisher) -> None:
    tensors = weights(0)
    resident.publish({"policy": tensors}, 1)
    tensors = settled(resident, tensors)
    for version in range(2, 7):
        if version == 4:
            resident.begin_settle()
        assert same(fetch(resident.publish({"policy": tensors}, version)), weights(0))
    tensors = settled(resident, tensors)
    tensors["w0"].zero_()
    assert same(fetch(resident.publish({"policy": tensors}, 7)), weights(0) | {"w0": torch.zeros(700)})


def test_a_move_that_was_begun_ends_with_what_was_published(resident: WeightPublisher) -> None:
    tensors = weights(0)
    resident.publish({"policy": tensors}, 1)
    resident.begin_settle()
    tensors = settled(resident, tensors)
    assert same(tensors, weights(0))
    resident.begin_settle()
    assert resident.settle() == {}, "what nobody has published may change where it is"
    tensors["w1"].zero_()
    handle = resident.publish({"policy": tensors}, 2)
    resident.begin_settle()
    tensors = settled(resident, tensors)
    tensors["w1"].fill_(3.0)
    assert torch.equal(fetch(handle)["w1"], torch.zeros(1000))


def test_resident_weights_survive_another_layout(resident: WeightPublisher) -> None:
    tensors = weights(0)
    resident.publish({"policy": tensors}, 1)
    tensors = settled(resident, tensors)
    more = tensors | {"extra": torch.ones(5)}
    assert same(fetch(resident.publish({"policy": more}, 2)), weights(0) | {"extra": torch.ones(5)})
    more = settled(resident, more)
    more["extra"].fill_(2.0)
    assert same(fetch(resident.publish({"policy": more}, 3)), weights(0) | {"extra": torch.full((5,), 2.0)})


def test_other_tensors_than_the_residents_are_copied(resident: WeightPublisher) -> None:
    tensors = weights(0)
    resident.publish({"policy": tensors}, 1)
    tensors = settled(resident, tensors)
    assert same(fetch(resident.publish({"policy": weights(5)}, 2)), weights(5))
    assert same(tensors, weights(0))


def test_a_version_that_is_made_in_its_room_is_not_copied(sender: WeightPublisher) -> None:
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights(0).items()}
    versions: dict[int, Weights] = {}
    for version in range(1, 6):
        versions.pop(version - 2, None)
        room = sender.room({"policy": shapes})
        assert {key: place.data_ptr() for key, place in sender.room({"policy": shapes}).items()} == {
            key: place.data_ptr() for key, place in room.items()
        }, "until it is published it is the same room"
        made = {name: room[f"policy/{name}"].copy_(tensor) for name, tensor in weights(version).items()}
        handle = sender.publish({"policy": made}, version)
        sender.settle()
        assert stream_of(sender, handle, "policy/w0").data.ctypes.data == made["w0"].data_ptr()
        versions[version] = fetch(handle)
        assert all(same(one, weights(number)) for number, one in versions.items())
    assert num_places(sender) == 2
    assert same(fetch(sender.publish({"policy": weights(6)}, 6)), weights(6)), "what was made elsewhere is copied"


# ---- the writer


def slow_writer(layout_weights: Weights) -> tuple[WritableSegment, WeightHandle, Callable[[], None]]:
    """A segment whose writer is told when to go on: its handle, and the call that writes all of it."""
    publisher = WeightPublisher(WeightSpec("shared_memory", block_bytes=BLOCK))
    handle = publisher.publish({"policy": layout_weights}, 1)
    publisher.settle()
    assert isinstance(publisher._sender, SegmentSender)
    place = publisher._sender._current
    assert place is not None
    for part in place.segment.streams():
        part.stamps[:] = 0

    def write() -> None:
        for part, source in zip(place.segment.streams(), layout_weights.values(), strict=True):
            part.write(source.view(torch.uint8).numpy(), 1)

    return place, handle, write


def test_readers_wait_for_the_writer_block_by_block() -> None:
    _, handle, write = slow_writer(weights(1))
    with pytest.raises(WeightError, match="in time"):
        fetch(handle, timeout_s=0.2)
    got: list[Weights] = []
    reader = threading.Thread(target=lambda: got.append(fetch(handle)))
    reader.start()
    time.sleep(0.2)
    assert not got
    write()
    reader.join(DEADLINE_S)
    assert same(got[0], weights(1))


def test_a_version_given_up_is_not_waited_for() -> None:
    place, handle, _ = slow_writer(weights(1))
    threading.Timer(0.2, lambda: setattr(place.segment, "turn", 0)).start()
    with pytest.raises(WeightError, match="could not write them"):
        fetch(handle)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_writer_that_dies_is_not_waited_for_and_leaves_nothing(when: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = os.fork()
    if child == 0:  # writes one tensor of three and then hangs
        segment = WritableSegment(layout_of({"policy": weights(1)}, BLOCK))
        segment.take(1)
        next(segment.segment.streams()).write(weights(1)["w0"].view(torch.uint8).numpy(), 1)
        ready.with_suffix(".tmp").write_text(f"{segment.path} {segment.segment.identity}")
        ready.with_suffix(".tmp").rename(ready)
        signal.pause()
    while not ready.exists():
        time.sleep(0.01)
    path, identity = ready.read_text().split()
    _, handle, _ = slow_writer(weights(1))
    frame = handle.frames[0]
    payload = replace(frame.payload, path=path, identity=int(identity))  # type: ignore[type-var]
    handle = replace(handle, frames=(replace(frame, payload=payload),))

    def kill() -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    started = time.monotonic()
    if when == "before":
        kill()
    else:
        threading.Timer(0.3, kill).start()
    with pytest.raises(WeightError, match="learner is gone" if when == "before" else "learner died"):
        fetch(handle)
    assert time.monotonic() - started < 10
    assert not os.path.exists(path)


def test_auto_takes_shared_memory_on_one_node_with_room() -> None:
    spec = WeightSpec("auto", one_node=True)
    assert spec.transport_for(1 << 20) == "shared_memory"
    assert spec.transport_for(1 << 50) == "object_store"
    assert replace(spec, one_node=False).transport_for(1 << 20) == "object_store"
    assert replace(spec, delta=True).transport_for(1 << 20) == "object_store"
    assert replace(spec, transport="disk").transport_for(1 << 20) == "disk"
    assert not has_room(1 << 50)

"""What all transports of weights promise: whole, verified versions or the old one; the tokens of a fresh engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from slipstream.conf.cluster_config import ClusterConfig
from slipstream.rollout.engine import EngineError
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Sampling
from slipstream.rollout.weight_handle import Arrays, Frame, Payload, Share, WeightError, WeightHandle
from slipstream.rollout.weight_receiver import WeightReceiver
from slipstream.rollout.weight_store import StorePayload
from slipstream.trainer.cluster import ray_cluster
from slipstream.trainer.weight_sync import WeightPublisher, WeightSpec, named_weights
from tests.tiny_models import tiny_model
from tests.weight_damage import damaged_version

TRANSPORTS = ("object_store", "disk", "broadcast")
WHOLE = ("shared_memory", *TRANSPORTS)
"""Those that send whole versions; shared memory sends nothing else, see test_weight_segments.py."""
WHOLE_AND_CHANGES = pytest.mark.parametrize(
    ("transport", "delta"), [*((name, False) for name in WHOLE), *((name, True) for name in TRANSPORTS)]
)
BLOCK = 1024
DEADLINE_S = 30.0
# Said by torch once; rollout/weight_handle.py tells why it is silenced, which pytest undoes.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(ClusterConfig(num_workers=1)):
        yield


class Worker:
    """An engine with its receiver, in this process."""

    def __init__(self, family: str = "qwen3", dtype: torch.dtype = torch.float32, kernels: str = "auto") -> None:
        self.engine = TorchEngine(tiny_model(family, seed=9).to(dtype), max_len=64, kernels=kernels)  # type: ignore[arg-type]
        self.receiver = WeightReceiver(self.engine, lambda: "here")

    def update(self, handle: WeightHandle) -> bool:
        """Fetches and serves; whether a whole version was needed."""
        receipt = self.receiver.prepare(handle, Share(), DEADLINE_S)
        assert self.receiver.commit(handle.version, [receipt]) == handle.version == self.engine.policy_version
        return receipt.whole

    def tokens(self) -> list[list[int]]:
        return tokens_of(self.engine)

    def weights(self) -> Weights:
        return {name: tensor.clone() for name, tensor in named_weights(self.engine.model).items()}


def tokens_of(engine: TorchEngine) -> list[list[int]]:
    sampling = Sampling(12, seed=3)
    engine.submit([Request(i, f"p{i}", i, np.arange(4, 9 + i, dtype=np.int32), sampling) for i in range(3)])
    return [rollout.tokens.tolist() for rollout in sorted(engine.drain(DEADLINE_S), key=lambda r: r.request.uid)]


def policy(seed: int, family: str = "qwen3", dtype: torch.dtype = torch.float32) -> Weights:
    return named_weights(tiny_model(family, seed=seed).to(dtype))


def fresh_tokens(weights: Weights, family: str = "qwen3", dtype: torch.dtype = torch.float32) -> list[list[int]]:
    model = tiny_model(family, seed=9).to(dtype)
    model.load_state_dict(weights, strict=False)
    return tokens_of(TorchEngine(model, max_len=64))


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


OPENED: list[WeightPublisher] = []


@pytest.fixture(autouse=True)
def close_publishers() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def publisher(transport: str, folder: Path, delta: bool = False, verify: bool = True) -> WeightPublisher:
    OPENED.append(WeightPublisher(WeightSpec(transport, delta, BLOCK, verify, str(folder / "weights"))))
    return OPENED[-1]


def nudged(weights: Weights, name: str, place: int) -> Weights:
    """One element of one tensor moved."""
    tensor = weights[name].clone()
    tensor.view(-1)[place] += 0.5
    return weights | {name: tensor}


# ---- what is served


@WHOLE_AND_CHANGES
@pytest.mark.parametrize(("family", "dtype"), [("qwen3", torch.float32), ("llama", torch.bfloat16)])
def test_tokens_are_those_of_a_fresh_engine(
    transport: str, delta: bool, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sender, worker = publisher(transport, tmp_path, delta), Worker(family, dtype)
    worker.tokens()
    for version in (1, 2, 3):
        weights = policy(version % 2, family, dtype)
        if version == 3:
            weights = nudged(weights, "model.embed_tokens.weight", 400)
        worker.update(sender.publish({"policy": weights}, version))
        assert same(worker.weights(), weights)
        assert worker.tokens() == fresh_tokens(weights, family, dtype)


@pytest.mark.parametrize("transport", WHOLE)
def test_the_sender_may_change_its_tensors_once_they_have_settled(transport: str, tmp_path: Path) -> None:
    weights = policy(1)
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    sender = publisher(transport, tmp_path)
    handle = sender.publish({"policy": weights}, 1)
    sender.settle()
    for tensor in weights.values():
        tensor.mul_(2.0)
    late, later = Worker(), Worker()
    late.update(handle)
    later.update(handle)
    assert same(late.weights(), expected)
    assert same(later.weights(), expected), "a handle serves any number of workers while it is current"


@pytest.mark.parametrize("transport", ["shared_memory", "object_store"])
def test_workers_of_a_node_compute_with_the_same_memory(transport: str, tmp_path: Path) -> None:
    handle = publisher(transport, tmp_path).publish({"policy": policy(1)}, 1)
    workers = [Worker(), Worker()]
    for worker in workers:
        worker.update(handle)
    first, second = (named_weights(worker.engine.model) for worker in workers)
    assert {t.data_ptr() for t in first.values()} == {t.data_ptr() for t in second.values()}
    model = workers[0].engine.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "tied stays tied"
    del handle
    expected = fresh_tokens(policy(1))
    # The store must not use the memory for something else while a model computes with it.
    for i in range(20):
        ray.put(np.full(1 << 20, i, np.uint8))
    assert workers[1].tokens() == expected


def test_shared_memory_is_never_written(tmp_path: Path) -> None:
    sender = publisher("object_store", tmp_path, delta=True)
    first, second = policy(1), nudged(policy(1), "model.norm.weight", 3)
    one, other = Worker(), Worker()
    handle = sender.publish({"policy": first}, 1)
    one.update(handle)
    other.update(handle)
    one.update(sender.publish({"policy": second}, 2))
    assert same(one.weights(), second)
    assert same(other.weights(), first)
    other.engine.update_policy(policy(4), 3)
    assert same(one.weights(), second)
    assert same(other.weights(), policy(4))


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_packed_layers_see_weights_that_come_back_to_an_old_address(kernels: str) -> None:
    worker, tensors = Worker(kernels=kernels), policy(1)
    worker.engine.update_policy(tensors, 1, adopt=True)
    before = worker.tokens()
    for name, tensor in policy(2).items():
        tensors[name].copy_(tensor)
    worker.engine.update_policy(policy(3), 2, adopt=True)
    worker.engine.update_policy(tensors, 3, adopt=True)
    assert worker.tokens() == fresh_tokens(policy(2)) != before


# ---- what is not


class Damaged:
    """A payload whose bytes were changed on their way."""

    same_pages, adoptable = True, True

    def __init__(self, payload: Payload, key: str, at: int | None) -> None:
        """at: of the byte that is flipped; None cuts the last byte off."""
        self._payload, self._key, self._at = payload, key, at

    def receive(self, timeout_s: float) -> Arrays:
        arrays = {key: data.clone() for key, data in self._payload.receive(timeout_s).items()}
        if self._at is None:
            arrays[self._key] = arrays[self._key][:-1]
        else:
            arrays[self._key][self._at] ^= 1
        return arrays


def damaged(handle: WeightHandle, key: str, at: int | None) -> WeightHandle:
    *before, last = handle.frames
    return replace(handle, frames=(*before, replace(last, payload=Damaged(last.payload, key, at))))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(
    ("at", "said"), [(5, "block 2 of 'policy/model.embed_tokens.weight'"), (None, "bytes of .* arrived")]
)
def test_damaged_bytes_leave_the_old_version(
    transport: str, delta: bool, at: int | None, said: str, tmp_path: Path
) -> None:
    sender, worker, key = publisher(transport, tmp_path, delta), Worker(), "policy/model.embed_tokens.weight"
    old = policy(1)
    worker.update(sender.publish({"policy": old}, 1))
    place = 2 * BLOCK // 4 + 7
    handle = sender.publish({"policy": nudged(old, "model.embed_tokens.weight", place)}, 2)
    assert (handle.frames[-1].blocks is not None) == delta
    where = at if at is None or delta else at + 2 * BLOCK
    with pytest.raises(WeightError, match=said):
        worker.update(damaged(handle, key, where))
    assert worker.engine.policy_version == 1
    assert same(worker.weights(), old)
    assert worker.tokens() == fresh_tokens(old)
    with pytest.raises(WeightError, match="not prepared"):
        worker.receiver.commit(2, [])
    worker.update(handle)
    assert worker.engine.policy_version == 2


def test_a_share_finds_what_lies_in_it_and_all_shares_find_everything(tmp_path: Path) -> None:
    handle, worker = publisher("object_store", tmp_path).publish({"policy": policy(1)}, 1), Worker()
    spec = handle.layout.tensors[-1]
    broken = damaged(handle, spec.key, spec.num_bytes - 1)
    for nth in range(3):
        worker.receiver.prepare(broken, Share(nth, 4), DEADLINE_S)
    with pytest.raises(WeightError, match=spec.key):
        worker.receiver.prepare(broken, Share(3, 4), DEADLINE_S)


def test_nobody_serves_what_the_receipts_do_not_vouch_for(tmp_path: Path) -> None:
    sender = publisher("object_store", tmp_path)
    one, other = Worker(), Worker()
    handle = sender.publish({"policy": policy(1)}, 1)
    old = one.weights()
    mine, others = (worker.receiver.prepare(handle, Share(i, 2), DEADLINE_S) for i, worker in enumerate((one, other)))
    elsewhere, before = replace(others, node="there"), replace(others, version=0)
    for receipts in ([], [mine], [others], [mine, elsewhere], [mine, before], [replace(mine, seconds=-1.0), others]):
        with pytest.raises(WeightError, match="nobody has verified all blocks"):
            one.receiver.commit(1, receipts)
    assert same(one.weights(), old)
    assert [worker.receiver.commit(1, [mine, others]) for worker in (one, other)] == [1, 1]
    assert same(one.weights(), policy(1))
    assert one.receiver.commit(1, [mine]) == 1, "told twice: the other one has died in between"
    with pytest.raises(WeightError, match="weights of version 2 were not prepared"):
        one.receiver.commit(2, [mine])
    other.receiver.prepare(handle, Share(1, 2), DEADLINE_S)
    with pytest.raises(WeightError, match="nobody has verified all blocks"):
        other.receiver.commit(1, [mine])


def test_verification_can_be_switched_off(tmp_path: Path) -> None:
    handle, worker = publisher("object_store", tmp_path, verify=False).publish({"policy": policy(1)}, 1), Worker()
    worker.update(damaged(handle, "policy/model.norm.weight", 0))
    with pytest.raises(WeightError, match="arrived"):
        worker.update(damaged(handle, "policy/model.norm.weight", None))


@pytest.mark.parametrize("transport", WHOLE)
def test_weights_of_another_model_are_refused_before_they_are_fetched(transport: str, tmp_path: Path) -> None:
    sender, worker = publisher(transport, tmp_path), Worker()
    before = worker.tokens()
    for weights, said in (
        ({"model.norm.weight": torch.zeros(48)}, "lack"),
        (policy(1) | {"more": torch.zeros(2)}, "more"),
        (policy(1) | {"model.norm.weight": torch.zeros(7)}, r"\(7,\)"),
    ):
        with pytest.raises(EngineError, match=said):
            worker.update(sender.publish({"policy": weights}, 1))
    assert worker.tokens() == before


def test_weights_that_do_not_come_are_an_error_not_a_wait(tmp_path: Path) -> None:
    # Any: ray's types know no functions made remote at run time. This one never starts: no machine has as much.
    remote: Any = ray.remote(num_cpus=1000)
    handle, worker = publisher("object_store", tmp_path).publish({"policy": policy(1)}, 1), Worker()
    never = replace(handle.frames[0], payload=StorePayload(remote(lambda: {}).remote()))
    with pytest.raises(WeightError, match="object store: GetTimeoutError"):
        worker.receiver.prepare(replace(handle, frames=(never,)), Share(), 0.2)


# ---- files


def test_a_killed_writer_leaves_nothing_that_is_served_and_no_litter(tmp_path: Path) -> None:
    sender, worker, folder = publisher("disk", tmp_path), Worker(), tmp_path / "weights"
    worker.update(sender.publish({"policy": policy(1)}, 1))
    ready_r, ready_w = os.pipe()
    child = os.fork()
    if child == 0:  # dies in the middle of writing version 2
        (folder / "weights-00000002.writing").write_bytes(b"\0" * 5000)
        os.write(ready_w, b"x")
        os._exit(9)
    os.read(ready_r, 1)
    os.waitpid(child, 0)
    assert not (folder / "weights-00000002.safetensors").exists()
    again = publisher("disk", tmp_path)
    assert list(folder.iterdir()) == [], "what an earlier job left is removed"
    worker.update(again.publish({"policy": policy(2)}, 2))
    assert same(worker.weights(), policy(2))


def test_files_are_whole_safetensors_and_few(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    sender, worker = publisher("disk", tmp_path), Worker()
    for version in range(1, 6):
        handle = sender.publish({"policy": policy(version)}, version)
        names = sorted(path.name for path in (tmp_path / "weights").iterdir())
        assert names == [f"weights-{v:08d}.safetensors" for v in range(max(1, version - 1), version + 1)]
    worker.update(handle)
    path = tmp_path / "weights" / "weights-00000005.safetensors"
    loaded = {name.removeprefix("policy/"): tensor for name, tensor in load_file(path).items()}
    assert same(loaded, policy(5))
    content = path.read_bytes()
    for damage, said in (
        (content[:-9], "bytes, "),
        (b"\xff" * len(content), "SafetensorError"),
        (None, "No such file"),
    ):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(WeightError, match=said):
            Worker().update(handle)
        path.write_bytes(content)
    path.unlink()
    assert worker.update(handle) is False, "who holds these very weights fetches nothing"


# ---- changes


def sent(handle: WeightHandle) -> tuple[int, list[str]]:
    frame: Frame = handle.frames[-1]
    return frame.num_bytes, ["whole" if f.blocks is None else "change" for f in handle.frames]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_changes_carry_the_changed_blocks_only(transport: str, tmp_path: Path) -> None:
    sender, worker, weights = publisher(transport, tmp_path, delta=True), Worker(), policy(1)
    handle = sender.publish({"policy": weights}, 1)
    assert sent(handle) == (handle.layout.num_bytes, ["whole"])
    assert worker.update(handle) is True
    weights = nudged(weights, "model.embed_tokens.weight", 0)
    weights = nudged(weights, "model.norm.weight", 47)  # 192 bytes: its only block is short
    handle = sender.publish({"policy": weights}, 2)
    assert sent(handle) == (BLOCK + 192, ["whole", "change"])
    assert worker.update(handle) is False
    assert same(worker.weights(), weights)
    handle = sender.publish({"policy": weights}, 3)
    assert sent(handle) == (0, ["whole", "change", "change"])
    assert worker.update(handle) is False
    late = Worker()
    assert late.update(handle) is True, "who holds none of these versions starts at the whole one"
    assert same(late.weights(), worker.weights())
    assert late.tokens() == worker.tokens() == fresh_tokens(weights)


def test_a_worker_that_missed_versions_catches_up(tmp_path: Path) -> None:
    sender, worker, weights = publisher("object_store", tmp_path, delta=True), Worker(), policy(1)
    worker.update(sender.publish({"policy": weights}, 1))
    for version in range(2, 6):
        weights = nudged(weights, "model.norm.weight", version)
        handle = sender.publish({"policy": weights}, version)
    assert worker.update(handle) is False
    assert same(worker.weights(), weights)


def test_changes_that_add_up_are_followed_by_a_whole_version(tmp_path: Path) -> None:
    sender, worker, kinds = publisher("disk", tmp_path, delta=True), Worker(), []
    weights = policy(1)
    rng = np.random.default_rng(0)
    for version in range(1, 12):
        handle = sender.publish({"policy": weights}, version)
        kinds.append(sent(handle)[1][-1])
        pending = sum(frame.num_bytes for frame in handle.frames[1:])
        assert pending <= handle.layout.num_bytes / 2
        worker.update(handle)
        assert same(worker.weights(), weights)
        for name in list(weights)[:: int(rng.integers(4, 8))]:
            weights = weights | {name: weights[name] + 1.0}
    assert "change" in kinds[1:]
    assert "whole" in kinds[1:]
    assert len(list((tmp_path / "weights").iterdir())) < 11


def test_a_change_onto_something_else_is_not_taken(tmp_path: Path) -> None:
    """A worker whose version is none of the handle's is given the whole one, never a change alone."""
    worker, other = Worker(), Worker()
    stranger = publisher("object_store", tmp_path, delta=True)
    worker.update(stranger.publish({"policy": policy(5)}, 1))
    sender, weights = publisher("object_store", tmp_path, delta=True), policy(1)
    other.update(sender.publish({"policy": weights}, 1))
    weights = nudged(weights, "model.norm.weight", 0)
    handle = sender.publish({"policy": weights}, 2)
    only_change = replace(handle, frames=handle.frames[1:])
    with pytest.raises(WeightError, match="do not add up"):
        worker.update(only_change)
    assert same(worker.weights(), policy(5))
    assert worker.update(handle) is True
    assert other.update(handle) is False
    assert same(worker.weights(), weights)


# ---- policy and draft


class DraftKeepingEngine(TorchEngine):
    """Keeps what it is told about its draft."""

    draft: tuple[dict[str, torch.Tensor], int] = ({}, 0)

    def update_draft(self, weights: object, version: int) -> None:
        assert isinstance(weights, dict)
        self.draft = {name: tensor.clone() for name, tensor in weights.items()}, version


@WHOLE_AND_CHANGES
def test_policy_and_draft_change_together(transport: str, delta: bool, tmp_path: Path) -> None:
    sender = publisher(transport, tmp_path, delta)
    engine = DraftKeepingEngine(tiny_model("qwen3", seed=9), max_len=64)
    receiver = WeightReceiver(engine, lambda: "here")
    draft = {"head.weight": torch.randn(64, 16), "head.bias": torch.randn(3)}
    for version in (1, 2):
        if version == 2:
            draft = draft | {"head.bias": torch.zeros(3)}
        handle = sender.publish({"policy": policy(1), "speculator": draft}, version)
        with damaged_version(sender, handle) as broken, pytest.raises(WeightError, match=r"head|add up"):
            receiver.prepare(broken, Share(), DEADLINE_S)
        assert engine.draft[1] == engine.policy_version == version - 1
        receipt = receiver.prepare(handle, Share(), DEADLINE_S)
        assert engine.draft[1] == engine.policy_version == version - 1
        receiver.commit(version, [receipt])
        assert engine.policy_version == version
        assert engine.draft[1] == version
        assert same(engine.draft[0], draft)

"""The learner's end of weight sync: policy and draft under one version number, out by the transport that was chosen.

Invariants
- Tied tensors travel once; what arrives has the dtype and the bits that were sent.
- A handle is given out only when all its bytes are where workers can fetch them, and they stay there until the next
  version is published: a worker that comes late is served from the same handle.
- A change is sent as the blocks whose checksum differs from the last version's, and only where that saves something:
  whole versions come at the start, for another layout, and once the changes since the last add up to half of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from slipstream.kernels.checksum import block_checksums
from slipstream.rollout.weight_files import remove_others, write_tensors
from slipstream.rollout.weight_handle import (
    Frame,
    Held,
    Layout,
    Part,
    Payload,
    TensorSpec,
    WeightHandle,
    as_bytes,
    digest_of,
)
from slipstream.trainer.weight_segment import SegmentSender, has_room

Tensors = Mapping[str, torch.Tensor]
MAX_CHANGED_SHARE = 0.5
"""Of a version's bytes: where changes add up to more, the next one is sent whole."""


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """weights.* of conf/weights.py. folder: where files go, this job's own; num_threads: of copies and checksums;
    backend: of a broadcast, gloo or nccl; num_receivers: workers that are expected to join one; one_node: whether all
    of them share this process's memory; resident: whether the tensors that are published are those that the next
    update changes, and their owner goes on with the ones that `settle` gives."""

    transport: str = "object_store"
    delta: bool = False
    block_bytes: int = 65536
    verify: bool = True
    folder: str = ""
    num_threads: int = 1
    backend: str = "gloo"
    num_receivers: int = 1
    one_node: bool = False
    resident: bool = False

    def transport_for(self, num_bytes: int) -> str:
        """The transport with `auto` resolved, for versions of so many bytes."""
        if self.transport != "auto":
            return self.transport
        shared = self.one_node and not self.delta and has_room(num_bytes)
        return "shared_memory" if shared else "object_store"


def move_weights(model: torch.nn.Module, moved: Tensors) -> None:
    """The model computes with these from now on. moved: by TensorSpec.key, see WeightPublisher.settle."""
    for name, tensor in model.state_dict(keep_vars=True).items() if moved else ():
        if (place := moved.get(f"policy/{name}")) is not None:
            tensor.data = place


def named_weights(model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The model's own tensors by name, one name per tied group. dtype: what floating tensors are rounded to."""
    seen: set[int] = set()
    out: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            out[name] = tensor.detach().to(wanted)
    return out


class Sender(Protocol):
    """One transport's way out. verifies: as of its payloads."""

    verifies: bool

    def send(self, name: str, layout: Layout, tensors: Tensors) -> Payload:
        """Brings the tensors (by TensorSpec.key) to where workers can fetch them. Whole versions hold all tensors of
        the layout, changes some blocks of some."""

    def room(self, layout: Layout) -> Tensors:
        """By TensorSpec.key, where the tensors to be sent may be made, which then need no copy; empty: anywhere."""

    def begin_settle(self) -> None:
        """Begins what `settle` waits for; returns at once."""

    def settle(self) -> Tensors:
        """Returns when the tensors sent last may change; by TensorSpec.key, where they live now if they have moved."""

    def keep(self, payloads: list[Payload]) -> None:
        """Everything sent that is not among these may go."""

    def close(self) -> None:
        """No worker comes any more."""


class SettledSender:
    """What is sent is a copy by the time that `send` returns."""

    verifies = False

    def room(self, layout: Layout) -> Tensors:
        """They are copied all the same."""
        return {}

    def begin_settle(self) -> None:
        """Nothing to do."""

    def settle(self) -> Tensors:
        """Nothing to do."""
        return {}


class StoreSender(SettledSender):
    """Ray's object store: the references in the payloads keep the objects."""

    def send(self, name: str, layout: Layout, tensors: Tensors) -> Payload:
        """One put."""
        from slipstream.rollout.weight_store import put_tensors

        return put_tensors(tensors)

    def keep(self, payloads: list[Payload]) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class FileSender(SettledSender):
    """safetensors files in a folder of this job's own; what lies there from before is removed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._before = folder, list[str]()
        if folder.is_dir():
            remove_others(folder, ())

    def send(self, name: str, layout: Layout, tensors: Tensors) -> Payload:
        """One file."""
        return write_tensors(self._folder, name, tensors)

    def keep(self, payloads: list[Payload]) -> None:
        """Keeps the files of the last handle too: a worker may be reading them."""
        current = [str(getattr(payload, "path", "")) for payload in payloads]
        remove_others(self._folder, [*self._before, *current])
        self._before = current

    def close(self) -> None:
        """The files stay: the newest are what a run folder shows."""


class WeightPublisher:
    """Turns tensors into handles, one after the other."""

    def __init__(self, spec: WeightSpec) -> None:
        self._spec = spec
        # `auto` depends on the size of the first version.
        self._sender: Sender | None = None if spec.transport == "auto" else make_sender(spec, 0)
        self._handle: WeightHandle | None = None
        self._sent: Held | None = None

    def room(self, parts: Mapping[Part, Tensors]) -> Tensors:
        """By TensorSpec.key, host memory in which the next version may be gathered, of which `publish` then makes no
        copy; empty where any memory will do. parts: tensors of the shapes and dtypes to come, on any device. Only for
        owners that are not resident."""
        layout = self._layout(parts)
        return self._sender_for(layout).room(layout)

    def publish(self, parts: Mapping[Part, Tensors], version: int) -> WeightHandle:
        """The next version of all parts. The tensors must not change before `settle`."""
        layout = self._layout(parts)
        sender = self._sender_for(layout)
        given = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        frames = self._frames(sender, layout, self._on_host(sender, layout, given), version)
        self._handle = WeightHandle(layout, frames, self._spec.verify)
        sender.keep([frame.payload for frame in frames])
        return self._handle

    def _layout(self, parts: Mapping[Part, Tensors]) -> Layout:
        layout = layout_of(parts, self._spec.block_bytes)
        known = self._handle.layout if self._handle is not None else layout
        return known if known == layout else layout

    def _sender_for(self, layout: Layout) -> Sender:
        if self._sender is None:
            self._sender = make_sender(self._spec, layout.num_bytes)
        return self._sender

    def _on_host(self, sender: Sender, layout: Layout, tensors: Tensors) -> Tensors:
        """Store, files and gloo read the host's memory: a GPU's tensors are copied there once, then summed up."""
        if self._spec.transport == "broadcast" and self._spec.backend == "nccl":
            return tensors
        if all(tensor.device.type == "cpu" for tensor in tensors.values()):
            return tensors
        room = sender.room(layout)
        return {key: room[key].copy_(tensor) if key in room else tensor.cpu() for key, tensor in tensors.items()}

    def begin_settle(self) -> None:
        """Begins what `settle` waits for: called when the next update begins, it is done by the time that one has its
        gradients."""
        if self._sender is not None:
            self._sender.begin_settle()

    def settle(self) -> Tensors:
        """Returns when the tensors published last may change; by TensorSpec.key, where they live now if they have
        moved: the owner of resident tensors goes on with these, and the version stays what it was."""
        return self._sender.settle() if self._sender is not None else {}

    def close(self) -> None:
        """No worker comes any more."""
        if self._sender is not None:
            self._sender.close()

    def _frames(self, sender: Sender, layout: Layout, tensors: Tensors, version: int) -> tuple[Frame, ...]:
        if not self._spec.delta:
            return (self._whole(sender, layout, tensors, version),)
        sums = all_checksums(layout, tensors, self._spec.num_threads)
        digest = digest_of(sums)
        frames = self._change(sender, layout, tensors, version, sums, digest)
        if frames is None:
            payload = sender.send(f"{version:08d}", layout, tensors)
            frames = (Frame(version, None, sums, digest, layout.num_bytes, payload),)
        self._sent = Held(layout, sums, digest)
        return frames

    def _change(
        self, sender: Sender, layout: Layout, tensors: Tensors, version: int, sums: np.ndarray, digest: int
    ) -> tuple[Frame, ...] | None:
        """The last version's frames and one of what changed since; None where a whole version is due."""
        before = self._sent
        if before is None or before.layout != layout or self._handle is None:
            return None
        changed = _with_whole_drafts(layout, np.flatnonzero(sums != before.checksums))
        num_bytes = sum(layout.sent_bytes(i, part) for i, part in enumerate(layout.split(changed)))
        pending = sum(frame.num_bytes for frame in self._handle.frames[1:]) + num_bytes
        if pending > MAX_CHANGED_SHARE * layout.num_bytes:
            return None
        payload = sender.send(f"{version:08d}-delta", layout, _changed_bytes(layout, tensors, changed))
        return (*self._handle.frames, Frame(version, changed, sums[changed], digest, num_bytes, payload))

    def _whole(self, sender: Sender, layout: Layout, tensors: Tensors, version: int) -> Frame:
        """A whole version; checksums and copy at the same time, both read the same memory."""
        apart = self._spec.verify and not sender.verifies
        with ThreadPoolExecutor(1) as beside:
            wanted = beside.submit(all_checksums, layout, tensors, self._spec.num_threads) if apart else None
            payload = sender.send(f"{version:08d}", layout, tensors)
            sums = np.zeros(0, np.uint64) if wanted is None else wanted.result()
        return Frame(version, None, sums, digest_of(sums), layout.num_bytes, payload)


def make_sender(spec: WeightSpec, num_bytes: int) -> Sender:
    """The transport named by the spec. num_bytes: of a version."""
    transport = spec.transport_for(num_bytes)
    if transport == "broadcast":
        from slipstream.trainer.weight_broadcast import BroadcastSender

        return BroadcastSender(spec.backend, node_address(), spec.num_receivers)
    if transport == "shared_memory":
        # The other half of the cores is left to the workers, who read behind the copy.
        return SegmentSender(max(1, spec.num_threads // 2), node_address(), spec.resident)
    return FileSender(Path(spec.folder)) if transport == "disk" else StoreSender()


def node_address() -> str:
    """By which other nodes of the Ray cluster know this one; loopback without a cluster."""
    import ray

    if not ray.is_initialized():
        return "127.0.0.1"
    # ray.util.get_node_ip_address names the machine's address in the network also where Ray keeps to loopback.
    here = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == here)


def layout_of(parts: Mapping[Part, Tensors], block_bytes: int) -> Layout:
    """The tensors in the order given."""
    specs = [
        TensorSpec(part, name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes)
        for part, named in parts.items()
        for name, tensor in named.items()
    ]
    return Layout(tuple(specs), block_bytes)


def all_checksums(layout: Layout, tensors: Tensors, num_threads: int) -> np.ndarray:
    """Of every block of a version: uint64."""

    def sums(spec: TensorSpec) -> np.ndarray:
        return block_checksums(as_bytes(tensors[spec.key]), layout.block_bytes)

    with ThreadPoolExecutor(num_threads) as threads:
        return np.concatenate([np.zeros(0, np.uint64), *threads.map(sums, layout.tensors)])


def _changed_bytes(layout: Layout, tensors: Tensors, changed: np.ndarray) -> dict[str, torch.Tensor]:
    """Of every tensor with changed blocks, these blocks one behind the other: flat uint8."""
    out = {}
    for spec, numbers in zip(layout.tensors, layout.split(changed), strict=True):
        if len(numbers):
            data, size = as_bytes(tensors[spec.key]), layout.block_bytes
            whole = spec.num_bytes // size
            rows = torch.from_numpy(numbers[numbers < whole]).to(data.device)
            parts = [data[: whole * size].view(-1, size)[rows].view(-1)]
            if numbers[-1] == whole:
                parts.append(data[whole * size :])
            out[spec.key] = torch.cat(parts)
    return out


def _with_whole_drafts(layout: Layout, changed: np.ndarray) -> np.ndarray:
    """A speculator of which any block changed travels whole: engines take new ones whole only."""
    offsets = layout.offsets
    of_draft = [i for i, spec in enumerate(layout.tensors) if spec.part == "speculator"]
    drafts = np.concatenate([np.zeros(0, np.int64), *(np.arange(offsets[i], offsets[i + 1]) for i in of_draft)])
    return np.union1d(changed, drafts) if np.isin(changed, drafts).any() else changed

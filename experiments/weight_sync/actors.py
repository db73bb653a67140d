"""The two ends of a transfer as actors: a learner that owns tensors, and workers that hold a model of them.

Invariants: publishing, preparing and serving are the job's own code; what is left out is the engine around the weights,
whose kernels would only take memory here.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch

from slipstream.rollout.engine import Patch
from slipstream.rollout.weight_handle import Share, WeightHandle
from slipstream.rollout.weight_receiver import Receipt, WeightReceiver
from slipstream.rollout.weights import WeightTable
from slipstream.trainer.weight_sync import WeightPublisher, WeightSpec

LARGE_ELEMENTS = 4 << 20
"""Of a weight matrix: 16 MiB in float32; beside each lies a norm of 2,048."""
SMALL_ELEMENTS = 2048


def make_model(mib: int) -> torch.nn.Module:
    """float32 parameters of `mib` MiB, uninitialised: matrices and, beside each, a small vector."""
    model = torch.nn.Module()
    for i in range(max(1, mib * 2**18 // LARGE_ELEMENTS)):
        for name, size in (("weight", LARGE_ELEMENTS), ("norm", SMALL_ELEMENTS)):
            model.register_parameter(f"layer_{i}_{name}", torch.nn.Parameter(torch.empty(size)))
    return model


class BenchLearner:
    """Owns the newest weights and publishes them by any transport."""

    def __init__(self, mib: int, num_threads: int, num_workers: int) -> None:
        torch.set_num_threads(1)
        self._num_workers = num_workers
        self._tensors = {name: tensor.detach() for name, tensor in make_model(mib).named_parameters()}
        for i, tensor in enumerate(self._tensors.values()):
            tensor.fill_(float(i))
        self._num_bytes = sum(tensor.nbytes for tensor in self._tensors.values())
        self._target = {name: torch.zeros_like(tensor) for name, tensor in self._tensors.items()}
        self._num_threads = num_threads
        self._publishers: dict[tuple[str, bool, bool], WeightPublisher] = {}

    def num_bytes(self) -> int:
        """Of all tensors."""
        return self._num_bytes

    def change(self) -> float:
        """The next update's weights; seconds until the last ones could be changed."""
        started = time.perf_counter()
        for publisher in self._publishers.values():
            for key, tensor in publisher.settle().items():
                self._tensors[key.removeprefix("policy/")] = tensor
        settle_s = time.perf_counter() - started
        for tensor in self._tensors.values():
            tensor.add_(1.0)
        return settle_s

    def publish(self, transport: str, verify: bool, resident: bool, folder: str, version: int) -> WeightHandle:
        """As the policy learner does; resident: as one that is alone."""
        key = transport, verify, resident
        if key not in self._publishers:
            spec = WeightSpec(
                transport,
                verify=verify,
                folder=folder,
                num_threads=self._num_threads,
                num_receivers=self._num_workers,
                resident=resident,
            )
            self._publishers[key] = WeightPublisher(spec)
        return self._publishers[key].publish({"policy": self._tensors}, version)

    def forget(self) -> None:
        """Another arm's turn: what this one keeps for late workers may go, and its weights lie in private memory."""
        for publisher in self._publishers.values():
            publisher.close()
        self._publishers.clear()
        self._tensors = {name: tensor.clone() for name, tensor in self._tensors.items()}

    def put_plainly(self) -> list[Any]:
        """A dictionary of tensors handed to Ray as it is: the baseline. The reference in a list."""
        return [ray.put(dict(self._tensors))]

    def copy_s(self) -> float:
        """Seconds to copy all tensors within this process, one thread, into memory that was written before."""
        started = time.perf_counter()
        for name, tensor in self._tensors.items():
            self._target[name].copy_(tensor)
        return time.perf_counter() - started

    def fresh_copy_s(self) -> float:
        """Seconds to copy them into shared memory that nobody has touched: the system must zero its pages first."""
        file = os.memfd_create("fresh")
        os.ftruncate(file, self._num_bytes)
        with mmap.mmap(file, self._num_bytes) as memory:
            target, at = torch.frombuffer(memory, dtype=torch.uint8), 0
            started = time.perf_counter()
            for tensor in self._tensors.values():
                target[at : at + tensor.nbytes].copy_(tensor.view(torch.uint8))
                at += tensor.nbytes
            seconds = time.perf_counter() - started
            del target
        os.close(file)
        return seconds


class BenchEngine:
    """What a receiver needs of an engine: the weights. adopts: as an engine on the CPU does; else it copies."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._table, self.adopts = WeightTable(model), True

    def check_policy(self, shapes: Mapping[str, tuple[int, ...]], version: int) -> None:
        """As TorchEngine."""
        self._table.check(shapes, version)

    def update_policy(
        self,
        weights: Mapping[str, torch.Tensor],
        version: int,
        adopt: bool = False,
        patches: Sequence[Mapping[str, Patch]] = (),
    ) -> None:
        """As TorchEngine."""
        (self._table.adopt if adopt and self.adopts else self._table.copy_from)(weights, version)


class BenchWorker:
    """A rollout worker without its engine."""

    def __init__(self, mib: int) -> None:
        torch.set_num_threads(1)
        self._model = make_model(mib)
        self._engine = BenchEngine(self._model)
        self._receiver = WeightReceiver(self._engine, self.node_id)

    def node_id(self) -> str:
        """As a rollout worker's."""
        return str(ray.get_runtime_context().get_node_id())

    def prepare_policy(self, handle: WeightHandle, share: Share, timeout_s: float) -> Receipt:
        """As a rollout worker's."""
        return self._receiver.prepare(handle, share, timeout_s)

    def commit_policy(self, version: int, *receipts: Receipt) -> int:
        """As a rollout worker's."""
        return self._receiver.commit(version, receipts)

    def set_adopts(self, adopts: bool) -> None:
        """Whether the model computes with the store's memory from now on, or copies it."""
        self._engine.adopts = adopts

    def copy_plainly(self, weights: Mapping[str, torch.Tensor], version: int) -> int:
        """The baseline's end: what Ray hands over is copied in place."""
        self._engine.update_policy(weights, version)
        return version

    def first_elements(self) -> list[float]:
        """Of every parameter: which version this worker really holds."""
        return [float(tensor[0]) for tensor in self._model.parameters()]

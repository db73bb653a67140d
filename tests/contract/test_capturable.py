"""A pass over static buffers asks its device for nothing: what makes it fit for a CUDA graph, seen without a GPU."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.triton_interpreter import DEVICE  # isort: skip

from slipstream.kernels.dispatch import KernelSet
from slipstream.rollout.graphs import StaticRunner
from slipstream.rollout.kv_cache import SlotKVCache
from tests.contract.test_engine_kernels import few_requests, make_engine, run

WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select")
"""Operations whose result the host must wait for; a stream that is being captured refuses them."""


class Watch(TorchDispatchMode):
    """Notes waiting operations, those of Triton's interpreter aside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(name in str(func) for name in WAITING):
            files = [frame.filename for frame in traceback.extract_stack()]
            if not any("/triton/runtime/" in name for name in files):
                self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchedRunner(StaticRunner):
    """Static steps whose passes are watched."""

    def __init__(self, model: Any, cache: SlotKVCache, kernels: KernelSet, **options: Any) -> None:
        super().__init__(model, cache, kernels, **options)
        self.watch = Watch()
        self.passes = 0

    def _pass(self, *arguments: Any) -> torch.Tensor:
        self.passes += 1
        with self.watch:
            return super()._pass(*arguments)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mixtral"])
def test_a_pass_waits_for_nothing(family: str) -> None:
    engine = make_engine(family, kernels="triton", max_live_requests=1)
    runner = WatchedRunner(engine.model, engine.cache, engine.kernels, spare_slot=1, max_requests=1)
    engine.runner = runner
    run(engine, few_requests(max_new_tokens=2)[:1])
    assert runner.passes == 2
    assert runner.watch.seen == []


def test_the_watch_sees_what_waits() -> None:
    watch = Watch()
    with watch:
        int(torch.ones(3, device=DEVICE).sum())
        torch.arange(4, device=DEVICE).nonzero()
    assert len(watch.seen) == 2

"""How a planned step is run: the protocol, and the packed runner of the CPU.

Invariants: `launch` starts one forward pass and may return before it is done; `collect` waits for it and gives what it
committed; the two alternate. Runners hold no state of a request: what they compute depends on the plan alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from slipstream.kernels.cache_layout import StepPlaces, TreePlaces
from slipstream.kernels.dispatch import KernelSet
from slipstream.kernels.reference import SamplingRows, Verified
from slipstream.rollout.kv_cache import SlotKVCache
from slipstream.rollout.packing import StepPlan


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a pass committed. Seconds from launch to result: forward_s in the model, sample_s in sampling; where both
    run on a device without a host round trip between them, forward_s holds the two, and what the host did meanwhile.
    graphed: the pass was a CUDA graph's."""

    verified: Verified
    forward_s: float
    sample_s: float
    graphed: bool = False


class StepRunner(Protocol):
    """Runs planned steps, one at a time. overlaps: launch returns while the pass runs, so the host can work beside."""

    overlaps: bool

    def launch(self, plan: StepPlan, rows: SamplingRows) -> None:
        """Starts the pass."""

    def collect(self) -> StepResult:
        """Waits for the pass that was launched last."""


def forward(
    model: Any, cache: SlotKVCache, token_ids: torch.Tensor, places: StepPlaces, logit_rows: torch.Tensor
) -> torch.Tensor:
    """Logits [R, V] of the packed rows `logit_rows`. token_ids: [T] int64; logit_rows: [R] int64."""
    cache.places, places.prefixes = places, cache.prefixes
    positions = places.positions if places.tree is None else places.tree.positions
    output = model(
        input_ids=token_ids[None],
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=logit_rows,
        slot_cache=cache,
    )
    return output.logits[0]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch's helper threads spin for a while after each operation, on the cores that our own threads need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PackedRunner:
    """Tokens of every request side by side, as many as there are: the native kernels and the plain twins."""

    def __init__(self, model: PreTrainedModel, cache: SlotKVCache, kernels: KernelSet) -> None:
        self._model, self._cache, self._kernels, self._device = model, cache, kernels, model.device
        self.overlaps = self._device.type == "cuda"
        self._launched: tuple[StepPlan, SamplingRows, torch.Tensor, float] | None = None

    def launch(self, plan: StepPlan, rows: SamplingRows) -> None:
        """Runs the model; on the CPU it is done on return."""
        started = time.perf_counter()
        places = StepPlaces(self._upload(plan.slots), self._upload(plan.positions))
        if plan.tree is not None:
            places.tree = TreePlaces(self._upload(plan.tree.positions), self._upload(plan.tree.parents))
        token_ids, logit_rows = self._upload(plan.token_ids), self._upload(plan.logit_rows)
        with one_torch_thread() if self._kernels.own_threads else nullcontext():
            logits = forward(self._model, self._cache, token_ids, places, logit_rows)
        self._launched = plan, rows, logits[: len(plan.row_drafts)], started

    def collect(self) -> StepResult:
        """Samples and verifies."""
        if self._launched is None:
            raise RuntimeError("collect without launch")
        (plan, rows, logits, started), self._launched = self._launched, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        forward_to = time.perf_counter()
        parents = None if plan.tree is None else plan.tree.row_parents
        verified = self._kernels.sample_verify(logits, plan.row_offsets, plan.row_drafts, rows, parents)
        return StepResult(verified, forward_to - started, time.perf_counter() - forward_to)

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        on_host = torch.from_numpy(array)
        return on_host if self._device.type == "cpu" else on_host.to(self._device, non_blocking=True)

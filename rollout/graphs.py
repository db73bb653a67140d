"""Steps over static buffers, replayed as CUDA graphs: one copy to the device, one back, nothing else on the host.

Invariants
- A pass reads the step's buffer, the weights and the KV cache, all at places that never move, and nothing else: a
  graph captured once is right for every later step of its bucket and for every later policy.
- The first pass of a bucket runs eagerly, for its result and to load its kernels; the second captures; all share one
  memory pool, because only one runs at a time and its result is copied out before the next begins.
- A bucket that cannot be captured runs eagerly from then on; this is said once a bucket and counted.
- The host's buffers are reused only after the device has read them: `collect` waits for the step's last copy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from slipstream.kernels.cache_layout import StepPlaces
from slipstream.kernels.dispatch import KernelError, KernelSet
from slipstream.kernels.reference import SamplingRows, Verified
from slipstream.kernels.split_plan import MIN_SPLIT_KEYS
from slipstream.rollout.kv_cache import SlotKVCache
from slipstream.rollout.packing import StepPlan
from slipstream.rollout.runners import StepResult, forward
from slipstream.rollout.static_step import (
    Bucket,
    SplitPolicy,
    StaticStep,
    bucket_bytes,
    bucket_views,
    make_step,
    power_of_two,
)

LOG = logging.getLogger(__name__)

PROGRAMS_PER_PROCESSOR = 4
"""Attention programs per multiprocessor of the GPU that a step's keys are shared among."""

INITIAL_BYTES = 2**18

Pass = Callable[[], torch.Tensor]
Capture = Callable[[Pass], Pass]
"""Records one call of a pass; the callable it returns replays it and gives the same tensor each time."""


@dataclass(slots=True)
class GraphStats:
    """captured: buckets with a graph; replayed: passes run as a graph; eager: passes run without one; refused: buckets
    that could not be captured, each with its reason."""

    captured: int = 0
    replayed: int = 0
    eager: int = 0
    refused: dict[Bucket, str] = field(default_factory=dict)


class CudaGraphs:
    """Captures passes of one device into graphs that share a memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> Pass:
        """Records `run` without running it. Raises RuntimeError (OutOfMemoryError among them) where that fails."""
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process (tracking, Ray) may talk to the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


@dataclass(slots=True)
class _Program:
    """The pass of one bucket. host: writable views of the staging buffer; seen: how often it was run."""

    bucket: Bucket
    num_bytes: int
    host: dict[str, np.ndarray]
    eager: Pass
    replay: Pass | None = None
    seen: int = 0


class StaticRunner:
    """Runs steps over static buffers, on any device and with any kernels.

    spare_slot: a slot of the cache that no request owns. max_requests: requests decoded together. capture: makes
    graphs of passes, None runs all of them eagerly. batch_invariant: the attention's splits depend on positions only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SlotKVCache,
        kernels: KernelSet,
        *,
        spare_slot: int,
        max_requests: int,
        capture: Capture | None = None,
        batch_invariant: bool = False,
    ) -> None:
        config: Any = model.config.get_text_config()
        if capture is not None and not kernels.on_device:
            raise KernelError(f"graphs need kernels that sample on the device, not {kernels.name}")
        self._model: Any = model
        self._cache, self._kernels, self._capture = cache, kernels, capture
        self._spare_slot, self._max_requests, self.batch_invariant = spare_slot, max_requests, batch_invariant
        self._device = device = model.device
        self._pinned = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if self._pinned else 1
        heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        self._policy = SplitPolicy(max(PROGRAMS_PER_PROCESSOR * processors, heads), heads, batch_invariant)
        self._programs: dict[Bucket, _Program] = {}
        self._staging = self._buffer = self._result = torch.empty(0, dtype=torch.uint8)
        self._grow(INITIAL_BYTES)
        self._done: Any = torch.cuda.Event() if self._pinned else None
        self._launched: tuple[_Program, StaticStep, SamplingRows, torch.Tensor, float] | None = None
        self.overlaps = self._pinned
        self.stats = GraphStats()

    def padded_tokens(self, num_requests: int, num_tokens: int) -> int:
        """Tokens that a decoding pass really computes for that many live requests: what a cost model should price."""
        requests = min(power_of_two(num_requests), max(self._max_requests, num_requests))
        return requests * power_of_two(-(-num_tokens // requests))

    def launch(self, plan: StepPlan, rows: SamplingRows) -> None:
        """Fills and copies the step's buffer and starts its pass; returns without waiting for the device."""
        started = time.perf_counter()
        step = make_step(plan, rows, self._policy, self._max_requests, self._cache.prefix_arrays)
        program = self._programs.get(step.bucket) or self._new_program(step.bucket)
        step.write(program.host, self._spare_slot, self._cache.max_len)
        size = program.num_bytes
        self._buffer[:size].copy_(self._staging[:size], non_blocking=True)
        out = self._run(program)
        if self._kernels.on_device:
            self._result[: len(out)].copy_(out, non_blocking=True)
            if self._done is not None:
                self._done.record()
        self._launched = program, step, rows, out, started

    def collect(self) -> StepResult:
        """Waits for the result's copy; the only time the host waits for the device."""
        if self._launched is None:
            raise RuntimeError("collect without launch")
        (program, step, rows, out, started), self._launched = self._launched, None
        offsets, drafts = step.arrays["row_offsets"], step.arrays["row_drafts"]
        if not self._kernels.on_device:
            forward_to = time.perf_counter()
            verified = self._kernels.sample_verify(out[: len(drafts)], offsets, drafts, rows)
            return StepResult(verified, forward_to - started, time.perf_counter() - forward_to)
        if self._done is not None:
            self._done.synchronize()
        verified = self._unpack(program.bucket, len(out), len(drafts), len(offsets) - 1)
        return StepResult(verified, time.perf_counter() - started, 0.0, program.replay is not None)

    def _unpack(self, bucket: Bucket, size: int, num_rows: int, num_requests: int) -> Verified:
        from slipstream.kernels.triton.sample_verify import unpack_verified

        # The buffer is written again by the next step: what leaves is a copy.
        whole = unpack_verified(self._result[:size].clone(), bucket.rows, bucket.requests)
        return Verified(
            whole.tokens[:num_rows],
            whole.logprobs[:num_rows],
            whole.count[:num_requests],
            whole.finish[:num_requests],
        )

    def _run(self, program: _Program) -> torch.Tensor:
        program.seen += 1
        recurs = program.bucket.decoding and program.seen > 1
        if self._capture is not None and recurs and program.replay is None and program.bucket not in self.stats.refused:
            self._try_capture(program, self._capture)
        if program.replay is None:
            self.stats.eager += 1
            return program.eager()
        self.stats.replayed += 1
        return program.replay()

    def _try_capture(self, program: _Program, capture: Capture) -> None:
        try:
            program.replay = capture(program.eager)
            self.stats.captured += 1
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            reason = str(error).strip().partition("\n")[0]
            bucket = program.bucket
            self.stats.refused[bucket] = reason
            LOG.warning(
                "no CUDA graph for %d requests, %d tokens: this size runs eagerly from now on (%s)",
                bucket.requests,
                bucket.tokens,
                reason,
            )

    # ---- buffers and passes

    def _new_program(self, bucket: Bucket) -> _Program:
        size = bucket_bytes(bucket)
        if size > len(self._buffer):
            self._grow(size)
        views = bucket_views(bucket, self._buffer)
        host = {name: view.numpy() for name, view in bucket_views(bucket, self._staging).items()}
        program = _Program(bucket, size, host, lambda: self._pass(bucket, views))
        self._programs[bucket] = program
        return program

    def _grow(self, size: int) -> None:
        """Larger buffers; programs made so far point to the old ones and are made again when next needed."""
        room = power_of_two(size)
        self._buffer = torch.zeros(room, dtype=torch.uint8, device=self._device)
        # A result holds 8 bytes a row and 5 a request, the inputs of the same step several times as much.
        self._staging, self._result = (torch.zeros(room, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(2))
        self._programs.clear()

    def _pass(self, bucket: Bucket, views: dict[str, torch.Tensor]) -> torch.Tensor:
        """The device's work of one step: the packed result, or the logits where sampling is the host's."""
        table = None
        if self._kernels.on_device:
            from slipstream.kernels.triton.step_table import step_table

            splits_of_one = -(-self._cache.max_len // MIN_SPLIT_KEYS)
            scratch = min(bucket.splits * bucket.width, splits_of_one * bucket.tokens)
            table = step_table(views, bucket.width, scratch, self.batch_invariant)
        places = StepPlaces(views["slots"], views["positions"], table)
        logits = forward(self._model, self._cache, views["token_ids"], places, views["logit_rows"])
        if table is None:
            return logits
        from slipstream.kernels.triton.sample_verify import sample_verify, static_rows

        rows = static_rows(views, bucket.filtered or self.batch_invariant)
        return sample_verify(logits, views["row_offsets"], views["row_drafts"], rows).packed

"""Microseconds of a call and bytes per second of a copy, on a GPU or a CPU.

Invariants: a figure is a median after a warm-up; a GPU is timed by its own events around replays of a graph, as the
engine runs it, so that launching costs nothing; the calls of one figure rotate over data larger than the caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

Call = Callable[[], object]

COPY_BYTES = 2**30
"""Bytes that the copy behind the ceiling reads on a GPU, and writes again; on a CPU a sixteenth of it."""

MIN_SECONDS = 0.02
"""Least time of one measurement."""


def microseconds(calls: Sequence[Call], device: torch.device, rounds: int) -> float:
    """Median time of one call, over `rounds` measurements of all of `calls` in turn."""
    measure = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    return 1e6 * float(np.median(measure(calls, rounds))) / len(calls)


def ceiling(device: torch.device, rounds: int) -> float:
    """Bytes per second of a large copy on the device, bytes read plus bytes written."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 16
    # Zeros would be read faster than real data.
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e6 * size / microseconds([lambda: target.copy_(source)], device, rounds)


def _cpu_seconds(calls: Sequence[Call], rounds: int) -> list[float]:
    def once(repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            for call in calls:
                call()
        return (time.perf_counter() - started) / repeats

    once(1)
    repeats = max(1, round(MIN_SECONDS / max(once(1), 1e-7)))
    return [once(repeats) for _ in range(rounds)]


def _cuda_seconds(calls: Sequence[Call], rounds: int) -> list[float]:
    # The first run loads and compiles: neither is allowed while a graph is captured.
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def once(repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    once(3)
    repeats = max(3, round(MIN_SECONDS / max(once(3), 1e-7)))
    return [once(repeats) for _ in range(rounds)]

"""Peak memory of an engine per live token, beside the bytes of its keys and values.

Invariants: the figure is a slope between two engines that differ only in how many requests they hold, so the model, the
libraries and the activations of a pass are in the constant; every slot is filled to its end; on the CPU each engine
has a process of its own, whose peak no other work has raised.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from slipstream.rollout.model_loader import load_policy
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Sampling

LIVE = (16, 80)
"""Requests of the smaller and the larger engine on the CPU."""

NUM_NEW = 2

GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc returns what is freed at once: else what passes leave behind, more with every pass, would count as live."""


def fill_engine(model: PreTrainedModel, live: int, tokens: int) -> int:
    """Runs `live` requests together until each slot holds `tokens`; returns the bytes of keys and values."""
    vocab = int(model.config.get_text_config().vocab_size)
    # The pass has the same width at every size: its activations belong to the constant.
    engine = TorchEngine(model, max_live_requests=live, max_len=tokens, max_forward_tokens=max(512, live))
    prompts = np.random.default_rng(0).integers(0, vocab, (live, tokens - NUM_NEW), dtype=np.int32)
    engine.submit([Request(i, f"p{i}", i, prompt, Sampling(NUM_NEW)) for i, prompt in enumerate(prompts)])
    while engine.num_unfinished:
        engine.step()
    return engine.cache.num_bytes()


def cpu_memory(model_path: str | Path, tokens: int = 480, live: tuple[int, int] = LIVE) -> dict[str, float]:
    """The figures for a model folder in float32 on the CPU."""
    command = [sys.executable, "-m", "slipstream.experiments.rollout_speed.memory", str(model_path), str(tokens)]
    readings = []
    for count in live:
        environment = os.environ | GIVE_BACK
        done = subprocess.run([*command, str(count)], env=environment, capture_output=True, text=True, check=True)
        readings.append(json.loads(done.stdout.splitlines()[-1]))
    return figures(readings, [count * tokens for count in live])


def cuda_memory(
    make: Callable[[], PreTrainedModel], device: torch.device, tokens: int, live: tuple[int, int]
) -> dict[str, float]:
    """The figures on a GPU, by the allocator's own peak."""
    readings = []
    for count in live:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kv_bytes = fill_engine(make(), count, tokens)
        readings.append({"peak": torch.cuda.max_memory_allocated(device) - before, "kv_bytes": kv_bytes})
    return figures(readings, [count * tokens for count in live])


def figures(readings: list[dict[str, Any]], live_tokens: list[int]) -> dict[str, float]:
    """Slopes and the constant, in bytes and MiB."""
    span = live_tokens[1] - live_tokens[0]
    peak, kv = ((readings[1][key] - readings[0][key]) / span for key in ("peak", "kv_bytes"))
    return {
        "peak_memory_per_live_token": peak,
        "kv_bytes_per_token": kv,
        "peak_memory_over_kv_bytes": peak / kv,
        "peak_memory_constant_mib": (readings[0]["peak"] - peak * live_tokens[0]) / 2**20,
    }


def own_peak() -> int:
    """The most bytes that this process ever had in memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM: peak memory is read on Linux only")
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens", type=int)
    parser.add_argument("live", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kv = fill_engine(load_policy(options.model), options.live, options.tokens)
    print(json.dumps({"peak": own_peak(), "kv_bytes": kv}))

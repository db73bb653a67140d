"""Which runner carries out an engine's steps, and why.

Invariants: an option that cannot take effect is either refused with an EngineError or ignored with the reason said in
the second value of make_runner; none changes a sampled token but through the rounding of its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from slipstream.kernels.dispatch import KernelSet
from slipstream.rollout.batch_invariant import make_invariant
from slipstream.rollout.engine import EngineError
from slipstream.rollout.graphs import Capture, CudaGraphs, StaticRunner
from slipstream.rollout.kv_cache import ATTENTION_NAME, SlotKVCache, ragged_attention_forward
from slipstream.rollout.runners import PackedRunner, StepRunner

UNCOMPILED_ATTENTION = f"{ATTENTION_NAME}_uncompiled"


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """engine.cuda_graphs: replay passes as graphs where that can be; engine.compile: torch.compile the model's own
    layers; engine.batch_invariant: no reduction depends on the batch or the draft width."""

    cuda_graphs: bool = True
    compile: bool = False
    batch_invariant: bool = False


def make_runner(
    model: PreTrainedModel, cache: SlotKVCache, kernels: KernelSet, options: RunnerOptions
) -> tuple[StepRunner, str]:
    """The runner of an engine and one line about it. The cache's last slot is the spare one.

    Raises EngineError where the sampler cannot take the model's vocabulary, and where batch_invariant cannot be kept.
    """
    if options.batch_invariant:
        make_invariant(model, kernels, model.dtype)
    run: Any = compiled(model, cache, kernels) if options.compile else model
    if not kernels.on_device:
        said = f"packed steps, no CUDA graphs: {kernels.name} kernels sample on the host"
        return PackedRunner(run, cache, kernels), said
    from slipstream.kernels.triton.sample_verify import MAX_VOCAB

    vocab = int(model.config.get_text_config().vocab_size)
    if vocab > MAX_VOCAB:
        raise EngineError(f"the model's vocabulary has {vocab} tokens; the sampling kernel takes up to {MAX_VOCAB}")
    capture: Capture | None = None
    if model.device.type != "cuda":
        reason = f"static steps, no CUDA graphs: the model is on {model.device}"
    elif not options.cuda_graphs:
        reason = "static steps, no CUDA graphs: engine.cuda_graphs=false"
    else:
        capture, reason = CudaGraphs(), "static steps, replayed as CUDA graphs"
    runner = StaticRunner(
        run,
        cache,
        kernels,
        spare_slot=cache.num_slots - 1,
        max_requests=cache.num_slots - 1,
        capture=capture,
        batch_invariant=options.batch_invariant,
    )
    return runner, reason


def compiled(model: PreTrainedModel, cache: SlotKVCache, kernels: KernelSet) -> Any:
    """The model under torch.compile; our cache, attention and native layers stay as they are, each a break in the
    compiled graph."""
    disable: Any = torch.compiler.disable
    AttentionInterface.register(UNCOMPILED_ATTENTION, disable(ragged_attention_forward))
    model.set_attn_implementation(UNCOMPILED_ATTENTION)
    for layer in cache.slot_layers:
        layer.update = disable(layer.update)  # type: ignore[method-assign]
    if not kernels.on_device:
        # They hand plain addresses to C++: a traced caller drops a tensor whose address is all that it still needs.
        inside: set[torch.nn.Module] = set()
        for module in model.modules():
            if "forward" in vars(module) and module not in inside:
                module.forward = disable(module.forward)
                inside.update(module.modules())
    return torch.compile(model)

"""Loads a policy for rollouts or training; the same code on both sides, so that they agree on architecture.

Invariants: weights come from safetensors only; a model with random_init depends on nothing but its config and seed.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(
    path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    random_init_seed: int | None = None,
    owned: bool = True,
) -> PreTrainedModel:
    """A causal LM from a folder or hub id. random_init_seed: take the architecture only, seeded random weights.

    owned=False leaves parameters that need no conversion where the file is mapped, without memory of their own: for
    callers that copy what they need and drop the rest at once. Raises OSError when transformers cannot find or read the
    model.
    """
    if random_init_seed is None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], use_safetensors=True)
        # Loaded tensors may be maps of the file: whoever replaces it would kill this process with a bus error.
        for tensor in itertools.chain(model.parameters() if owned else (), model.buffers()):
            tensor.data = tensor.data.clone()
    else:
        torch.manual_seed(random_init_seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=DTYPES[dtype])
    placed: Any = model  # transformers' wrapper around `to` has no usable type
    return placed.to(device)


def default_device(num_gpus: float) -> str:
    """The GPU when this process was given (a share of) one, else the CPU."""
    return "cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu"

"""transformers' own ways to generate, made to produce responses of given lengths.

Invariant: every row of a peer gets exactly the number of tokens it is asked for and is sampled at temperature 1, so
that arms differ in speed, not in work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from slipstream.rollout.types import Request

NUM_LOOKUP_TOKENS = 10
"""transformers' documentation uses 10 for prompt lookup."""


class RowLengths(StoppingCriteria):
    """Each row is done when it has its number of new tokens."""

    def __init__(self, prompt_width: int, lengths: Sequence[int]) -> None:
        self.ends = prompt_width + torch.as_tensor(np.asarray(lengths), dtype=torch.long)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """[rows] bool."""
        return input_ids.shape[1] >= self.ends.to(input_ids.device)


def batched_generate(model: PreTrainedModel, requests: Sequence[Request], lengths: Sequence[int], pad: int) -> float:
    """Wall seconds of generate() on all requests in one left-padded batch."""
    width = max(len(request.prompt) for request in requests)
    ids = torch.full((len(requests), width), pad)
    mask = torch.zeros((len(requests), width), dtype=torch.long)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt) :] = torch.from_numpy(request.prompt)
        mask[row, width - len(request.prompt) :] = 1
    started = time.perf_counter()
    # Lengths are ours to decide: no token of the model's may end a row early.
    stop = {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([RowLengths(width, lengths)])}
    out = _generate(model, ids.to(model.device), mask.to(model.device), max(lengths), pad, **stop)
    seconds = time.perf_counter() - started
    if out.shape[1] != width + max(lengths):
        raise RuntimeError(f"generate made {out.shape[1] - width} tokens, expected {max(lengths)}")
    return seconds


def trl_generate(model: PreTrainedModel, requests: Sequence[Request], lengths: Sequence[int], pad: int) -> float:
    """Wall seconds of what TRL's GRPO trainer does without an inference server: generate() on the unwrapped model."""
    from accelerate import Accelerator
    from trl.models import unwrap_model_for_generation

    accelerator = Accelerator(cpu=model.device.type == "cpu")
    wrapped: Any = accelerator.prepare_model(model, evaluation_mode=True)
    with unwrap_model_for_generation(wrapped, accelerator) as unwrapped:
        return batched_generate(unwrapped, requests, lengths, pad)


def one_by_one(
    model: PreTrainedModel, requests: Sequence[Request], lengths: Sequence[int], pad: int, **assistance: Any
) -> float:
    """Wall seconds of generate() on one request after the other: assisted generation takes batches of one only."""
    started = time.perf_counter()
    for request, length in zip(requests, lengths, strict=True):
        ids = torch.from_numpy(request.prompt.astype(np.int64))[None].to(model.device)
        # Assistance looks at the end token: here it is kept out by its probability instead.
        out = _generate(model, ids, torch.ones_like(ids), length, pad, min_new_tokens=length, **assistance)
        if out.shape[1] < ids.shape[1] + length:
            raise RuntimeError(f"generate made {out.shape[1] - ids.shape[1]} tokens, expected {length}")
    return time.perf_counter() - started


def _generate(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    max_new_tokens: int,
    pad: int,
    **options: Any,
) -> torch.Tensor:
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    with torch.inference_mode():
        return generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **options,
        )


def first_layers(model: PreTrainedModel, make: Callable[[], PreTrainedModel], num_layers: int) -> PreTrainedModel:
    """An assistant: the same model with its first `num_layers` layers only. make: a fresh copy."""
    assistant = make()
    inner: Any = assistant.get_decoder()
    inner.layers = inner.layers[:num_layers]
    assistant.config.num_hidden_layers = num_layers
    if getattr(assistant.config, "layer_types", None):
        assistant.config.layer_types = assistant.config.layer_types[:num_layers]
    return assistant.to(model.device).eval()  # type: ignore[arg-type]

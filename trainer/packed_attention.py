"""Log-probabilities of a micro-batch, padded or packed, and the attention of packed sequences.

Invariants: a token sees earlier tokens of its own sequence and nothing else; a layer that was not told where the
sequences end raises; log-probabilities are taken at the sampling temperature (law 2).

Packed sequences are cut apart for the attention alone, one call for each. The usual way, a block-diagonal mask over the
whole row, makes the attention pay for all pairs of tokens of the row, masked or not, and rules out the kernels that
take no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from slipstream.trainer.batch import PackedBatch, PaddedBatch
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.losses import token_logprobs

PACKED_ATTENTION = "slipstream_packed"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
PROBE_LENGTHS = (5, 9)
MAX_PROBE_ERROR = 0.05
"""Largest difference of logits in the probe, relative to their spread; rounding of bfloat16 is a tenth of that, a
token that sees another sequence changes them by about their spread."""


def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, H, T, D], key and value [1, KV heads, T, D] -> [1, T, H, D].

    sequence_lengths: adds up to T, comes through the model's keyword arguments. sliding_window: a token sees the last
    so many, itself included.
    """
    if sequence_lengths is None or attention_mask is not None:
        raise ValueError("packed attention needs sequence_lengths and takes no mask; the model passed on the wrong one")
    pieces = []
    parts = (tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        mask = _window(q.shape[2], sliding_window, q.device)
        pieces.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(pieces, dim=1), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, length, length] bool, or None where plain causal attention says the same."""
    if sliding_window is None or length <= sliding_window:
        return None
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return (allowed & ~allowed.tril(-sliding_window))[None, None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)


def batch_logprobs(model: torch.nn.Module, batch: PaddedBatch | PackedBatch, temperature: float) -> tuple[Tensor, ...]:
    """(log p of the targets, entropy of the distributions), each in the layout of `batch.rows`: [B, L] float32.

    Outside of responses they are those of whatever stands there; the mask of the rows leaves them out.
    """
    device = next(model.parameters()).device
    inputs = torch.from_numpy(batch.input_ids).to(device)
    targets = torch.from_numpy(batch.targets).to(device)
    if isinstance(batch, PaddedBatch):
        attention = torch.from_numpy(batch.attention).to(device)
        logits = model(input_ids=inputs, attention_mask=attention, use_cache=False).logits
        return token_logprobs(logits, targets, temperature)
    logits = packed_logits(model, inputs, torch.from_numpy(batch.position_ids).to(device), batch.lengths)
    predicting = torch.from_numpy(batch.predicting).to(device)
    place = torch.from_numpy(batch.place).to(device)
    return tuple(values[place] for values in token_logprobs(logits[0, predicting], targets, temperature))


def packed_logits(model: torch.nn.Module, inputs: Tensor, positions: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[1, T, V] logits of sequences side by side. inputs, positions: [1, T]."""
    return model(input_ids=inputs, position_ids=positions, use_cache=False, sequence_lengths=lengths).logits


@torch.no_grad()
def use_packed_attention(model: PreTrainedModel, key: str) -> None:
    """Switches the model over. ConfigError naming `key` where its layers cannot be kept to their own sequence."""
    config = model.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if unknown or getattr(config, "attention_chunk_size", None):
        kinds = ", ".join(sorted(unknown)) or "chunked attention"
        raise ConfigError(f"{key}=true: {model.config.model_type} has layers of kind {kinds}; allowed: {key}=false")
    model.set_attn_implementation(PACKED_ATTENTION)


@torch.no_grad()
def probe_packing(model: torch.nn.Module, key: str) -> None:
    """Two short sequences, packed and apart: ConfigError naming `key` where the model computes something else."""
    device = next(model.parameters()).device
    model.eval()
    tokens = [torch.arange(1, length + 1, device=device)[None] for length in PROBE_LENGTHS]
    places = [torch.arange(length, device=device)[None] for length in PROBE_LENGTHS]
    apart = [packed_logits(model, *one, (one[0].shape[1],)) for one in zip(tokens, places, strict=True)]
    together = packed_logits(model, torch.cat(tokens, 1), torch.cat(places, 1), PROBE_LENGTHS)
    expected = torch.cat(apart, 1).float()
    error = (together.float() - expected).abs().max() / expected.std().clamp(min=1e-6)
    if not error <= MAX_PROBE_ERROR:
        raise ConfigError(f"{key}=true: this model's tokens see other sequences of a row; allowed: {key}=false")

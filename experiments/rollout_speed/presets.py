"""Models of the GPU arm: shapes of published models with seeded random weights, made in place.

Invariants: nothing is downloaded; the same preset and seed give the same weights on the same device.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

QWEN3_06B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40_960,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
PRESETS = {
    "qwen3_0.6b": (Qwen3Config, QWEN3_06B),
    "llama_1b": (LlamaConfig, LLAMA_1B),
    "llama_8b": (LlamaConfig, LLAMA_8B),
    "tiny": (Qwen3Config, TINY),
}
"""tiny is for tests of the bench itself."""


def make_model(preset: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A model of that shape with random weights. Raises KeyError for an unknown preset."""
    kind, shape = PRESETS[preset]
    config: Any = kind(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def bytes_read(model: PreTrainedModel) -> int:
    """Bytes of weights that a pass over few tokens must read: all but an embedding that is only looked up in."""
    total = sum(tensor.nbytes for tensor in model.parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    return total if tied else total - int(table.weight.nbytes)  # type: ignore[arg-type]

"""Tiny random models of every architecture family the engine must run."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("qwen3", "llama", "gemma2", "gemma3", "mixtral")


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A seeded random model; sliding windows are shorter than the texts of the tests."""
    torch.manual_seed(seed)
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**COMMON))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=12, sliding_window=9, query_pre_attn_scalar=12))
    elif family == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, head_dim=12, sliding_window=7, layer_types=layers))
    else:
        model = MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2))
    with torch.no_grad():  # sharper logits than at initialisation: some drafts are right, some are wrong
        model.get_output_embeddings().weight.mul_(8.0 if family != "gemma3" else 2.0)
    return model.eval()

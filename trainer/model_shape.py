"""How big a model is, read from its config.json and the headers of its safetensors files.

Invariants: no tensor is loaded and torch is not imported, so a 70 B model is measured in milliseconds; a
layout that is not understood gives None and never a guess.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on.

    num_parameters: as stored, tied weights once. kv_values_per_token: keys and values of all layers for one
    token. max_positions: tokens the model was made for, None when the config does not say.
    """

    num_parameters: int
    kv_values_per_token: int
    max_positions: int | None


def read_model_shape(folder: Path) -> ModelShape | None:
    """The shape of the model in `folder`; None without safetensors files or with an unusual config."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        num_parameters = sum(_count_parameters(path) for path in folder.glob("*.safetensors"))
        text = config.get("text_config", config)
        kv_values = _kv_values_per_token(text)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, struct.error):
        return None
    return ModelShape(num_parameters, kv_values, text.get("max_position_embeddings")) if num_parameters else None


def _count_parameters(path: Path) -> int:
    """A safetensors file begins with 8 bytes, the little-endian length of the JSON header that follows."""
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _kv_values_per_token(config: dict[str, Any]) -> int:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim

"""Settings that look like secrets are refused: settings are written into run folders and sent to Weights & Biases.

Invariants: the message names the key and never shows the value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from slipstream.trainer.errors import ConfigError

KEY = re.compile(r"(^|_)(secret|token|password|passwd|api_?key|credentials?)$", re.IGNORECASE)
VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,}|xox[abp]-[\w-]{10,})"
    r"|://[^/\s:@]+:[^/\s@]+@"
)
"""Keys of Hugging Face, model services, code forges, clouds and chats; and passwords in addresses."""
ENVIRONMENT = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN")
_SHORTEST = 8


def refuse_secrets(tree: Mapping[str, Any]) -> None:
    """ConfigError, one line, for the first value that looks like a secret; tree: plain settings."""
    known = [value for name in ENVIRONMENT if len(value := os.environ.get(name, "")) >= _SHORTEST]
    if key := _find(tree, "", known):
        raise ConfigError(
            f"{key}: its value, not shown here, looks like a secret, and settings are written into the run folder and "
            "sent to Weights & Biases; allowed: an environment variable that the program reads"
        )


def _find(value: Any, key: str, known: list[str]) -> str | None:
    if isinstance(value, Mapping):
        items = [(f"{key}.{name}" if key else str(name), part) for name, part in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{key}[{i}]", part) for i, part in enumerate(value)]
    else:
        secret = isinstance(value, str) and value and _looks_secret(key.rpartition(".")[2], value, known)
        return key if secret else None
    return next((found for name, part in items if (found := _find(part, name, known))), None)


def _looks_secret(name: str, value: str, known: list[str]) -> bool:
    return bool(KEY.search(name) or VALUE.search(value) or any(secret in value for secret in known))

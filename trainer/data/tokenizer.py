"""Tokenizers without torch: `tokenizer.json` through the `tokenizers` library, chat templates through jinja2.

Invariants: importing this and loading a tokenizer never imports torch or transformers (which imports torch);
the tokens of a chat are those that `transformers` computes from the same files, special tokens of the
template included and none added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from slipstream.trainer.errors import DataError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTokenizer:
    """Text to token ids and back for one model, read from `folder`.

    eos_token_id, pad_token_id: None where the model states none. stop_token_ids: the end tokens of tokenizer
    and generation config together; a response ends with any of them. chat_template: jinja2 source, "" for
    none.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.folder, self.name_or_path = folder, name
        config = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        if (folder / "chat_template.jinja").is_file():
            config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.chat_template = _template_source(config.get("chat_template"))
        named = {key: _content(config.get(key)) for key in TEMPLATE_TOKENS}
        self.special_tokens = {key: token for key, token in named.items() if token}
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")
        ends = generation.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_token_ids = tuple(sorted({end for end in [self.eos_token_id, *ends] if end is not None}))

    def __len__(self) -> int:
        return self.core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none added; the text of a special token becomes that token."""
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def chat_text(self, messages: list[dict[str, str]]) -> str:
        """The chat template applied, generation prompt included; jinja2.TemplateError when it refuses."""
        return self._template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **self.special_tokens
        )

    def chat_tokens(self, messages: list[dict[str, str]]) -> np.ndarray:
        """[p] int32: the tokens of `chat_text`."""
        return np.asarray(self.encode(self.chat_text(messages)), np.int32)

    @cached_property
    def _template(self) -> Template:
        # The environment that chat templates are written for: blocks take their line break with them.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.chat_template)

    def _special_id(self, key: str) -> int | None:
        return self.core.token_to_id(self.special_tokens[key]) if key in self.special_tokens else None


def load_tokenizer(path: str | Path, key: str = "model.path") -> ChatTokenizer:
    """The tokenizer of a model folder or hub id; `key` names the setting that holds `path`, for errors.

    Raises DataError, one line, when there is none, it cannot be read, or it has no chat template.
    """
    where = f"{key}={str(path)!r}"
    folder = Path(path) if Path(path).is_dir() else _download(str(path), where)
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"{where} has no tokenizer.json; convert its tokenizer once with transformers: "
            "AutoTokenizer.from_pretrained(path).save_pretrained(folder)"
        )
    try:
        tokenizer = ChatTokenizer(folder, str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise DataError(f"{where}: its tokenizer cannot be read: {' '.join(str(error).split())}") from error
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: its tokenizer has no chat template; use the instruct version of the model, "
            "or put a chat_template.jinja beside its tokenizer.json"
        )
    return tokenizer


def _download(name: str, where: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where} is no folder, and no hub model could be loaded: {reason}") from error


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _template_source(value: Any) -> str:
    if isinstance(value, list):  # several named templates
        value = next((entry["template"] for entry in value if entry.get("name") == "default"), None)
    return value or ""


def _tojson(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks text to train on; here it is only rendered."""

    tags = {"generation"}  # noqa: RUF012  (the type that jinja2 declares)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

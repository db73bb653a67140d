"""What the schema allows, in words, for messages that a person reads.

Invariants: everything here is derived from schema.py, so a message cannot promise what the schema refuses;
keys are dotted paths (`algo.num_steps`); no torch, no ray, no file is opened.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from functools import cache
from typing import Any

from slipstream.conf.schema import Settings

FREE_FORM = "engine.extra_args"
"""The one section that takes any key."""

TYPE_WORDS = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "a section of keys",
}


@cache
def default_tree() -> dict[str, Any]:
    """The schema's defaults as plain nested dictionaries."""
    return Settings().model_dump(mode="json")


@cache
def all_keys() -> tuple[str, ...]:
    """Every key of the schema, sections included, in the schema's order."""
    return tuple(_walk(default_tree(), ""))


def section_of(key: str) -> str:
    """The section that holds `key`; empty for the top level."""
    return key.rpartition(".")[0]


def keys_in(section: str) -> list[str]:
    """The names directly under `section` (empty: the top level)."""
    return [key.rpartition(".")[2] for key in all_keys() if section_of(key) == section]


def is_free_form(key: str) -> bool:
    """True for keys under `engine.extra_args`, which may have any name."""
    return key.startswith(FREE_FORM + ".")


def nearest(word: str, candidates: Iterable[str]) -> str:
    """The candidate most like `word`; a dotted key that ends in `word` beats a merely similar one."""
    pool = list(candidates)
    leaf = word.rpartition(".")[2]
    same_leaf = [key for key in pool if key.rpartition(".")[2] == leaf]
    return difflib.get_close_matches(word, same_leaf or pool, n=1, cutoff=0.0)[0]


def nearest_key(key: str, groups: Iterable[str] = ()) -> str:
    """The valid key (or group) most like `key`; within its section, where that section exists."""
    section = section_of(key)
    if section in all_keys() and section != FREE_FORM:
        return nearest(key, [f"{section}.{name}" for name in keys_in(section)])
    return nearest(key, [*all_keys(), *groups])


def allowed(key: str) -> str:
    """What may stand at `key`, for example `an integer of at least 1`."""
    schema = Settings.model_json_schema()
    node = schema
    for part in key.split("."):
        node = _follow(node, schema)["properties"][part]
    return _words(_follow(node, schema))


def _walk(tree: dict[str, Any], prefix: str) -> Iterable[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        yield key
        if isinstance(value, dict):
            yield from _walk(value, f"{key}.")


def _follow(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else node


def _words(node: dict[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_words(choice) for choice in node["anyOf"])
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return ", ".join(str(choice) for choice in node["enum"])
    if "properties" in node:
        return f"a section with the keys {', '.join(node['properties'])}"
    if node["type"] == "array":
        return f"a list [a, b] of {TYPE_WORDS[node['items']['type']]}"
    return TYPE_WORDS[node["type"]] + _bounds(node)


def _bounds(node: dict[str, Any]) -> str:
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
        "pattern": "that matches",
    }
    parts = [f"{text} {_plain(node[name])}" for name, text in words.items() if name in node]
    return f" {' and '.join(parts)}" if parts else ""


def _plain(bound: Any) -> str:
    return json.dumps(int(bound)) if isinstance(bound, float) and bound.is_integer() else str(bound)

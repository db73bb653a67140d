"""From overrides to checked settings.

Invariants: Hydra composes, the strict schema decides; whatever a person can get wrong ends as ConfigError,
one line for each mistake; nothing here imports torch or ray. The schema's defaults are the base node of
every composition, so YAML files hold differences only and every key can be overridden as KEY=VALUE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

import slipstream.conf
from slipstream.conf.describe import allowed, default_tree, nearest
from slipstream.conf.schema import Settings
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.overrides import check_overrides, find_choices, unknown_key

CONF_DIR = Path(slipstream.conf.__file__).resolve().parent
BUILTIN_MODELS = {"chain_sum": "quickstart/policy"}
"""Policies shipped with the package, by name: folders under slipstream.experiments."""
PATH_KEYS = ("run.dir", "model.path", "data.train_path", "data.validation_path")
HYDRA_DETAILS = ("full_key:", "object_type=", "Config search path:", "provider=")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_settings(
    overrides: Sequence[str], config_dir: Path | None = None, base: Mapping[str, Any] | None = None
) -> Settings:
    """Composes and validates.

    overrides: KEY=VALUE and GROUP=CHOICE; later ones win. config_dir: a folder with more choices, laid out
    like conf/. base: a complete tree of saved settings to start from, in place of the defaults and choices.
    Raises ConfigError, one line.
    """
    folders = [CONF_DIR, *([config_dir] if config_dir else [])]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: no such folder; allowed: a folder laid out like {CONF_DIR}")
    checked = check_overrides(overrides, find_choices(folders))
    if config_dir:
        checked.append(f"hydra.searchpath=['file://{config_dir.resolve()}']")
    return validate(_compose(checked, base))


def validate(tree: Mapping[str, Any]) -> Settings:
    """Settings of a plain tree; ConfigError names the first mistake and counts the others."""
    try:
        return Settings.model_validate(_expand_home(tree))
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{_explain(first)}{more}") from None


def model_folder(path: str) -> Path | None:
    """The folder of a policy on this machine: built-in or local; None for a hub id.

    ConfigError for an unknown built-in name and for a local path that does not hold a model.
    """
    if path.startswith("builtin:"):
        return _builtin_folder(path.removeprefix("builtin:"))
    folder = Path(path)
    if not folder.exists() and HUB_ID.fullmatch(path):
        return None
    if not (folder / "config.json").is_file():
        reason = "it holds no config.json" if folder.is_dir() else "no such folder"
        raise ConfigError(
            f"model.path={path}: {reason}; allowed: a model folder, a hub id org/name or builtin:chain_sum"
        )
    return folder


def check_paths(settings: Settings) -> None:
    """ConfigError with one line for each path that is missing, unreadable or not writable."""
    problems = []
    try:
        model_folder(settings.model.path)
    except ConfigError as error:
        problems.append(str(error))
    if settings.data.source == "parquet":
        problems += _data_problem("data.train_path", settings.data.train_path)
        problems += _data_problem("data.validation_path", settings.data.validation_path)
    problems += _run_dir_problem(Path(settings.run.dir))
    if problems:
        raise ConfigError("\n".join(problems))


def _compose(overrides: list[str], base: Mapping[str, Any] | None) -> dict[str, Any]:
    store = ConfigStore.instance()
    store.store(name="schema_defaults", node=dict(default_tree()))
    primary = "main"
    if base is not None:
        groups: list[Any] = [{group: None} for group in find_choices([CONF_DIR])]
        store.store(name="saved_settings", node=dict(base))
        store.store(name="resumed", node={"defaults": ["saved_settings", *groups]})
        primary = "resumed"
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = compose(primary, overrides)
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_one_line(error)) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _one_line(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(HYDRA_DETAILS)]
    return f"{key}: {' '.join(lines)}" if key else " ".join(lines)


def _explain(error: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    parts, given = error["loc"], error["input"]
    key = ".".join(str(part) for part in parts if not isinstance(part, int))
    shown = f"{key}{''.join(f'[{part}]' for part in parts if isinstance(part, int))}={_short(given)}"
    if error["type"] == "extra_forbidden" and key in find_choices([CONF_DIR]):
        return f"{shown}: allowed: keys of the job; an {key} file begins with the line # @package _global_"
    if error["type"] == "extra_forbidden":
        return str(unknown_key(key, shown))
    text = f"{shown}: allowed: {allowed(key)}"
    if error["type"] == "literal_error":
        text += f"; nearest: {key}={nearest(str(given), allowed(key).split(', '))}"
    if error["type"] == "string_type" and isinstance(given, int | float):
        text += f"; a number that is meant as text needs quotes: '\"{_short(given)}\"'"
    return text


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "null" if value is None else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def _expand_home(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A ~ in a YAML file is expanded here, once, for everybody who opens the path."""
    config = OmegaConf.create(dict(tree))
    for key in PATH_KEYS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str):
            OmegaConf.update(config, key, os.path.expanduser(value))
    return dict(OmegaConf.to_container(config))  # type: ignore[arg-type]


def _builtin_folder(name: str) -> Path:
    if name not in BUILTIN_MODELS:
        names = [f"builtin:{known}" for known in BUILTIN_MODELS]
        raise ConfigError(
            f"model.path=builtin:{name}: no such policy; allowed: {', '.join(names)}; nearest: {names[0]}"
        )
    spec = find_spec("slipstream.experiments")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations))) / BUILTIN_MODELS[name]
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.path=builtin:{name}: {folder} is missing from this installation; reinstall slipstream"
        )
    return folder


def _data_problem(key: str, path: str | None) -> list[str]:
    if path is None or os.access(path, os.R_OK):
        return []
    if os.path.exists(path):
        return [f"{key}={path}: permission denied; allowed: a readable parquet file or folder"]
    if HUB_ID.fullmatch(path) and not path.endswith(".parquet"):
        return []
    return [f"{key}={path}: no such file or folder; allowed: a parquet file or folder, or a hub id org/name"]


def _run_dir_problem(folder: Path) -> list[str]:
    """The nearest existing ancestor decides whether the folder can be made."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [f"run.dir={folder}: {existing} is a file; allowed: a folder that can be written to"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"run.dir={folder}: {existing} is not writable; allowed: a folder that can be written to"]
    return []

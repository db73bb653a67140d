"""What a person types after `slipstream train`: KEY=VALUE and GROUP=CHOICE, checked before anything is
composed.

Invariants: an override that passes names a key of the schema (or one under engine.extra_args) or an
existing choice of an existing group; each mistake is one ConfigError line with the text given, what is
allowed and the nearest valid key. Hydra's own messages assume a reader who knows Hydra; none of them is
needed for these mistakes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from slipstream.conf.describe import all_keys, is_free_form, keys_in, nearest, nearest_key, section_of
from slipstream.trainer.errors import ConfigError

OPTIONAL_GROUPS = ("experiment",)
"""Groups that may be left out with GROUP=null."""


def find_choices(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The choices of every group: {"drafter": ["ngram", "off", "suffix"], ...}, over all `folders`.

    ConfigError when two folders hold the same choice: which of the two was meant could only be guessed.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*/*.yaml"))):
        names = found.setdefault(path.parent.name, {})
        if path.stem in names:
            other = names[path.stem]
            raise ConfigError(f"{path}: {other} has the same name; allowed: a name that its group does not have yet")
        names[path.stem] = path
    return {group: sorted(names) for group, names in sorted(found.items())}


def check_overrides(overrides: Sequence[str], choices: Mapping[str, Sequence[str]]) -> list[str]:
    """The overrides as Hydra should get them; ConfigError for the first one that cannot be right.

    Of several choices for one group the last wins, as it does for keys.
    """
    checked = [_checked(text, choices) for text in overrides]
    last = {text.partition("=")[0]: text for text in checked}
    kept = [text for text in checked if text.partition("=")[0] not in choices]
    return [text for group, text in last.items() if group in choices and not text.endswith("=null")] + kept


def split_experiment(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The choice of the experiment group, if one was typed, and the other overrides."""
    prefix = "experiment="
    named = [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]
    return (named[-1] if named else None), [text for text in overrides if not text.startswith(prefix)]


def unknown_key(key: str, shown: str, groups: Sequence[str] = ()) -> ConfigError:
    """One line for a key that the schema does not have. `shown`: what was given, as KEY=VALUE."""
    section = section_of(key)
    while section and section not in all_keys():
        section = section_of(section)
    where = f"keys of {section}" if section else "keys and groups" if groups else "keys"
    names = list(dict.fromkeys([*keys_in(section), *(groups if not section else ())]))
    close = nearest_key(key, groups)
    return ConfigError(f"{shown}: there is no key {key!r}; allowed {where}: {', '.join(names)}; nearest: {close}")


def _checked(text: str, choices: Mapping[str, Sequence[str]]) -> str:
    text = _with_home(text)
    override = _parse(text)
    key = override.key_or_group
    if override.type == OverrideType.DEL:
        raise ConfigError(f"{text}: keys cannot be deleted; allowed: {key}=... with another value or choice")
    if override.package is not None or override.is_sweep_override():
        raise ConfigError(f"{text}: allowed is one KEY=VALUE or GROUP=CHOICE; write a list as KEY=[a,b]")
    if is_free_form(key):
        return f"++{key}={text.partition('=')[2]}"
    if key in choices:
        return _checked_choice(text, override, choices[key])
    if key not in all_keys():
        raise unknown_key(key, text, groups=list(choices))
    if override.type == OverrideType.ADD:
        raise ConfigError(f"{text}: {key} is in the configuration already; allowed: {text.lstrip('+')}")
    # A whole section, KEY={a: 1, b: 2}, is merged; the schema then judges each of its keys.
    return f"++{text}" if isinstance(override.value(), dict) and override.type == OverrideType.CHANGE else text


def _checked_choice(text: str, override: Override, names: Sequence[str]) -> str:
    group, choice = override.key_or_group, override.value()
    if override.type != OverrideType.CHANGE:
        raise ConfigError(f"{text}: {group} is chosen, not added; allowed: {text.lstrip('+')}")
    if choice is None and group in OPTIONAL_GROUPS:
        return text
    if choice not in names:
        close = nearest(str(choice), names)
        raise ConfigError(f"{text}: {group} has no such choice; allowed: {', '.join(names)}; nearest: {group}={close}")
    return text


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).strip().splitlines()[0]
        allowed = "KEY=VALUE or GROUP=CHOICE; lists as [a,b], text with spaces or brackets as 'KEY=\"...\"'"
        raise ConfigError(f"{text or 'an empty override'}: {reason}; allowed: {allowed}") from None


def _with_home(text: str) -> str:
    """Shells leave the ~ of KEY=~/folder alone, and Hydra's grammar knows no such character."""
    key, equals, value = text.partition("=")
    return f"{key}{equals}{os.path.expanduser(value)}" if value.startswith("~") else text

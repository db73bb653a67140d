"""Which folder a job writes to, and whether it starts there or carries on.

Invariants: a run folder holds settings.json, the fully resolved settings it runs with; an existing run is
touched only when the person said so (run.exist or --resume); a resumed run keeps everything that its
sampled tokens depend on, so that it gives the tokens it would have given without the interruption (law 5).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slipstream.conf.describe import nearest
from slipstream.conf.schema import Settings
from slipstream.trainer.config import load_settings, validate
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.overrides import split_experiment
from slipstream.trainer.secret_values import refuse_secrets

SETTINGS_FILE = "settings.json"
NEWEST = ""
"""Value of `resume` that stands for the newest run of the experiment."""
MAY_CHANGE_ON_RESUME = (
    # where it runs and writes, and who is told
    "run.dir",
    "run.name",
    "run.exist",
    "cluster",
    "tracking",
    "watchdog",
    "checkpoint",
    # how fast the tokens come: no sampled token depends on it (law 1)
    "engine",
    "drafter",
    "budget",
    # what only looks on
    "proof",
    "evaluation",
    # how long it goes on, and what a machine can stand; the same sums in other parts
    "algo.num_steps",
    "algo.max_tokens_per_microbatch",
    "reward.timeout_s",
)
"""Keys and sections that a resumed run may have otherwise. All others decide what the run computes, or which run it is:
a resume that changes them is refused. algo.num_steps counts among those while algo.schedule is not constant, because
the learning rate then falls towards the last step."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one command starts. resume: run_dir holds a run that is carried on."""

    settings: Settings
    run_dir: Path
    resume: bool


def resolve_job(
    overrides: Sequence[str], resume: str | None, config_dir: Path | None, now: datetime | None = None
) -> Job:
    """Decides settings and folder; writes nothing.

    resume: None follows run.exist; NEWEST carries on the newest run of the experiment under run.dir; a folder
    carries on that one. A resumed run starts from its own saved settings, with the overrides on top.
    """
    if resume is None:
        return _job_from_settings(load_settings(overrides, config_dir), now or datetime.now())
    if resume != NEWEST:
        return _resumed(Path(resume), overrides, config_dir)
    wanted = load_settings(overrides, config_dir)
    parent = Path(wanted.run.dir)
    folder = parent / wanted.run.name if wanted.run.name else newest_run(parent, wanted.experiment_name)
    return _resumed(folder, overrides, config_dir)


def open_run_dir(job: Job) -> None:
    """Makes the folder (run.exist=replace empties it first) and writes settings.json into it."""
    if not job.resume and job.settings.run.exist == "replace" and job.run_dir.exists():
        if not is_run(job.run_dir) and any(job.run_dir.iterdir()):
            raise ConfigError(f"run.exist=replace: {job.run_dir} is not a run folder; allowed: another run.name")
        shutil.rmtree(job.run_dir)
    try:
        if job.resume:
            _write_settings(job.settings, job.run_dir)
        else:
            _make_run(job.settings, job.run_dir)
    except OSError as error:
        raise ConfigError(
            f"run.dir={job.settings.run.dir}: {job.run_dir} cannot be written ({error.strerror}); allowed: "
            "a folder that can be written to"
        ) from None


def newest_run(parent: Path, experiment_name: str) -> Path:
    """The run of this experiment under `parent` that was started or resumed last."""
    runs = sorted(parent.glob(f"*/{SETTINGS_FILE}"), key=lambda path: path.stat().st_mtime_ns)
    own = [path.parent for path in runs if _read_settings(path.parent).get("experiment_name") == experiment_name]
    if own:
        return own[-1]
    others = ", ".join(path.parent.name for path in runs[-3:]) or "none"
    raise ConfigError(f"--resume: no run of experiment {experiment_name!r} under {parent}; runs there: {others}")


def _job_from_settings(settings: Settings, now: datetime) -> Job:
    parent, run = Path(settings.run.dir), settings.run
    if run.name is None:
        return _job(settings, _free_folder(parent, f"{settings.experiment_name}-{now:%Y%m%d-%H%M%S}"), resume=False)
    folder = parent / run.name
    if not folder.exists() or run.exist == "replace" or (folder.is_dir() and not any(folder.iterdir())):
        return _job(settings, folder, resume=False)
    if run.exist == "fail":
        raise ConfigError(
            f"run.name={run.name}: {folder} exists already; allowed: run.exist=resume to carry it on, "
            "run.exist=replace to delete it first, or another run.name"
        )
    _check_same_run(validate(_saved(folder)), settings, folder)
    return _job(settings, folder, resume=True)


def _resumed(folder: Path, overrides: Sequence[str], config_dir: Path | None) -> Job:
    saved = _saved(folder)
    experiment, others = split_experiment(overrides)
    # The saved settings hold the experiment and the changes made to it; choosing it again would undo them.
    if experiment not in (None, "null"):
        name = load_settings(overrides, config_dir).experiment_name
        started_as = saved.get("experiment_name")
        if name != started_as:
            raise ConfigError(f"experiment={experiment}: {folder} is a run of {started_as}; allowed: that one")
    settings = load_settings(others, config_dir, base=saved)
    _check_same_run(load_settings([], base=saved), settings, folder)
    return _job(settings, folder, resume=True)


def _check_same_run(saved: Settings, wanted: Settings, folder: Path) -> None:
    """ConfigError, one line, with every key that must not change, its new value and the old one."""
    before, after = _leaves(saved.model_dump(mode="json")), _leaves(wanted.model_dump(mode="json"))
    keys = sorted(before.keys() | after.keys())
    differing = [key for key in keys if before.get(key) != after.get(key) and not _may_change(key, saved, wanted)]
    if differing:
        listed = ", ".join(f"{key}={_shown(after.get(key))} (was {_shown(before.get(key))})" for key in differing)
        raise ConfigError(
            f"{listed}: {folder} was started otherwise, and what it computes depends on it; allowed: the earlier "
            f"value{'s' if len(differing) > 1 else ''}, or a new run"
        )


def _may_change(key: str, saved: Settings, wanted: Settings) -> bool:
    if key == "algo.num_steps":
        return saved.algo.schedule == wanted.algo.schedule == "constant"
    return any(key == root or key.startswith(f"{root}.") for root in MAY_CHANGE_ON_RESUME)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _job(settings: Settings, folder: Path, resume: bool) -> Job:
    """The folder that was decided on becomes part of the settings, so that settings.json tells all but secrets."""
    refuse_secrets(settings.model_dump(mode="json"))
    run = settings.run.model_copy(update={"name": folder.name, "dir": str(folder.parent)})
    return Job(settings.model_copy(update={"run": run}), folder, resume)


def _free_folder(parent: Path, name: str) -> Path:
    """Two jobs started within one second get different folders."""
    number, folder = 1, parent / name
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a run."""
    return (folder / SETTINGS_FILE).is_file()


def _saved(folder: Path) -> dict[str, Any]:
    if is_run(folder):
        return _read_settings(folder)
    names = [path.parent.name for path in folder.parent.glob(f"*/{SETTINGS_FILE}")]
    close = f"; nearest: {folder.parent / nearest(folder.name, names)}" if names else ""
    raise ConfigError(f"--resume {folder}: it holds no {SETTINGS_FILE}; allowed: the folder of an earlier run{close}")


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); allowed: the settings of an earlier run") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no settings; allowed: the settings of an earlier run")
    return tree


def _write_settings(settings: Settings, folder: Path) -> None:
    """Whole or not at all: a crash in between must not leave a run without settings."""
    partial = folder / f".{SETTINGS_FILE}.{os.getpid()}"
    partial.write_text(json.dumps(settings.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / SETTINGS_FILE)


def _make_run(settings: Settings, folder: Path) -> None:
    """The folder appears with its settings in it: one without would be neither new nor an earlier run."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        _write_settings(settings, draft)
        # Onto an empty folder this succeeds, onto anything else it does not.
        os.rename(draft, folder)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, dict) and value
        found |= _leaves(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found

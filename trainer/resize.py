"""How many rollout workers a running job is to have: asked for in its run folder, seen to by the job between two steps.

Invariants: the wish is one file, put in place whole; it holds until another one is there, over a resume too; a wish
that cannot be read is reported and changes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from slipstream.trainer.errors import ConfigError

FILE = "workers.wanted"
MAX_WORKERS = 4096


class Pool(Protocol):
    """What of a RolloutPool is asked for."""

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """By name, with a `state`."""

    def add_worker(self) -> str:
        """One more; its name."""

    def remove_worker(self, name: str, drain: bool = True) -> None:
        """One less."""


def main(arguments: Sequence[str]) -> int:
    """The command `slipstream workers`."""
    from slipstream.trainer.main import OneLineParser
    from slipstream.trainer.run_folder import SETTINGS_FILE, is_run

    parser: argparse.ArgumentParser = OneLineParser(
        prog="slipstream workers",
        description="Asks a running job for another number of rollout workers; from its next step on they come and go. "
        "One more needs room in the Ray cluster, which nodes that join bring; one less finishes what it has started.",
    )
    parser.add_argument("run", type=Path, help="the job's run folder")
    parser.add_argument("num", type=int, nargs="?", help="workers wanted (default: print what was asked for last)")
    args = parser.parse_args(arguments)
    if not is_run(args.run):
        raise ConfigError(f"{args.run}: no run folder; allowed: a folder with {SETTINGS_FILE}, such as runs/NAME")
    if args.num is None:
        wanted = read_wanted(args.run)
        print("as the job was started" if wanted is None else wanted)
        return 0
    if not 1 <= args.num <= MAX_WORKERS:
        raise ConfigError(f"workers={args.num}; allowed: 1 to {MAX_WORKERS}")
    draft = args.run / f"{FILE}.writing"
    draft.write_text(f"{args.num}\n", encoding="utf-8")
    os.replace(draft, args.run / FILE)
    return 0


def read_wanted(run_dir: Path) -> int | None:
    """What was asked for last, None if nothing was. ConfigError: the file holds something else."""
    try:
        text = (run_dir / FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MAX_WORKERS:
        raise ConfigError(f"{run_dir / FILE}: {text[:40]!r}; allowed: 1 to {MAX_WORKERS}")
    return int(text)


def resize(pool: Pool, run_dir: Path) -> list[str]:
    """Lets workers join or leave until as many are there, or on their way, as are wanted; what is to be said."""
    try:
        wanted = read_wanted(run_dir)
    except ConfigError as error:
        print(f"slipstream: {error}", file=sys.stderr)
        return []
    names = [name for name, facts in pool.workers.items() if facts["state"] != "leaving"]
    if wanted is None or wanted == len(names):
        return []
    joining = [pool.add_worker() for _ in range(wanted - len(names))]
    leaving = names[wanted:]
    for name in leaving:
        pool.remove_worker(name)
    said = f"{', '.join(joining)} to join once Ray has room" if joining else f"{', '.join(leaving)} to leave"
    return [f"{wanted} rollout workers wanted: {said}"]

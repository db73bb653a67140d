"""`slipstream bench NAME`: asks one of the experiments its question and writes down the answer.

Invariants: a bench is a folder of slipstream.experiments with a module run.py that has
`add_arguments(parser)` and `run(args) -> dict`, named like the folder or by a constant NAME of run.py;
listing benches imports none of them; a written result always tells the hardware, the commit and the command
that made it.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import slipstream.experiments
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.main import OneLineParser

LIBRARIES = ("slipstream", "torch", "transformers", "triton", "numpy", "ray", "sglang", "verl")


def main(argv: Sequence[str]) -> int:
    """Runs one bench, or lists them all; returns the exit code."""
    benches = find_benches()
    if not argv or argv[0] in ("-h", "--help"):
        print(_listing(benches))
        return 0
    name = argv[0]
    if name not in benches:
        raise ConfigError(f"bench {name}: no such bench; {_allowed(name, list(benches))}")
    module = import_module(f"slipstream.experiments.{_runs()[name].parent.name}.run")
    parser = OneLineParser(prog=f"slipstream bench {name}", description=benches[name], allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result, hardware and commit here")
    module.add_arguments(parser)
    args = parser.parse_args(list(argv[1:]))
    if args.json and not args.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder; allowed: a file in an existing folder")
    result = module.run(args)
    print(format_result(result))
    if args.json:
        write_result(args.json, name, result, argv)
    return 0


def find_benches() -> dict[str, str]:
    """Name and question (first line of run.py's docstring) of every bench, in alphabetical order."""
    return {name: _first_line(path) for name, path in _runs().items()}


def format_result(result: dict[str, Any]) -> str:
    """A table of two columns; nested dictionaries become dotted keys."""
    rows = list(_rows(result))
    width = max((len(key) for key, _ in rows), default=0)
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in rows)


def write_result(path: Path, name: str, result: dict[str, Any], argv: Sequence[str]) -> None:
    """Writes the result with everything needed to judge or repeat it."""
    record = {
        "name": name,
        "result": result,
        "hardware": describe_hardware(),
        "commit": _commit(),
        "command": shlex.join(["slipstream", "bench", *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **dict(_versions())},
    }
    path.write_text(json.dumps(record, indent=2, default=_number) + "\n", encoding="utf-8")


def describe_hardware() -> dict[str, Any]:
    """cpu model, usable cores, memory in GiB and the GPUs (None without any)."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory_kib = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": cpu[0] if cpu else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib[0] / 2**20, 1) if memory_kib else None,
        "gpu": _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
    }


def _allowed(name: str, benches: list[str]) -> str:
    close = get_close_matches(name, benches, n=1, cutoff=0.0)
    return f"allowed: {', '.join(benches)}; nearest: {close[0]}" if close else "none is installed"


def _listing(benches: dict[str, str]) -> str:
    width = max((len(name) for name in benches), default=0)
    lines = [f"  {name:<{width}}  {question}" for name, question in benches.items()]
    return "\n".join(["usage: slipstream bench NAME [--json PATH] [options of NAME]", "", "benches:", *lines])


def _runs() -> dict[str, Path]:
    """run.py of every bench, by the bench's name."""
    folders = [Path(folder) for folder in slipstream.experiments.__path__]
    runs = {_name(path): path for folder in folders for path in folder.glob("*/run.py")}
    return dict(sorted(runs.items()))


def _name(path: Path) -> str:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["NAME"]:
            return str(ast.literal_eval(node.value))
    return path.parent.name


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _rows(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in result.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{value:,.4g}" if isinstance(value, float) else str(value)


def _commit() -> str | None:
    """The commit these files are at, with `+changes` when they differ from it; None outside of git."""
    here = ("git", "-C", str(Path(__file__).parent))
    commit = _output(*here, "rev-parse", "HEAD")
    changed = commit and _output(*here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def _versions() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if os.path.exists(path) else []


def _number(value: Any) -> Any:
    """numpy scalars and arrays know how to become plain Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a bench returned {type(value).__name__}; allowed: numbers, text, lists and dictionaries")

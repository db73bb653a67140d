"""`slipstream data chain_sum`: the built-in task as verl-format parquet, for any trainer that reads it.

Invariants: the files hold exactly the prompts that `data.source=task` would use with the same numbers and
seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from slipstream.conf.schema import TaskConfig
from slipstream.trainer.data.chain_sum import LEVEL_STEPS, Split, make_rows
from slipstream.trainer.data.parquet import write_rows
from slipstream.trainer.errors import ConfigError, SlipstreamError

SPLITS: tuple[Split, ...] = ("train", "validation")


def length_table(rows: Sequence[dict[str, Any]]) -> str:
    """Per level: rows, steps, and the median and longest worked answer in bytes; the tail ratio below."""
    lines = [f"{'level':>7} {'rows':>6} {'steps':>7} {'p50 bytes':>10} {'max bytes':>10}"]
    by_level: dict[int, list[int]] = {}
    for row in rows:
        by_level.setdefault(row["extra_info"]["level"], []).append(len(row["extra_info"]["answer"]))
    for level, lengths in sorted(by_level.items()):
        low, high = LEVEL_STEPS[level]
        steps = f"{low}-{high}"
        lines.append(f"{level:>7} {len(lengths):>6} {steps:>7} {np.median(lengths):>10.0f} {max(lengths):>10}")
    lengths = [length for level_lengths in by_level.values() for length in level_lengths]
    p50, p99 = np.percentile(lengths, [50, 99])
    lines.append(f"    all {len(lengths):>6} {'':>7} {p50:>10.0f} {max(lengths):>10}   p99/p50 {p99 / p50:.1f}")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command; argparse prints its own one-line errors and exits with 2."""
    parser = argparse.ArgumentParser("slipstream data", description="Writes a built-in task as parquet.")
    parser.add_argument("task", choices=["chain_sum"])
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and validation.parquet")
    for name in ("num_train", "num_validation", "min_level", "max_level", "seed"):
        default = TaskConfig.model_fields[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Writes both files and prints one table each."""
    values = {name: value for name, value in vars(args).items() if name not in ("task", "out")}
    try:
        task = TaskConfig(name=args.task, **values)
    except ValidationError as error:
        first = error.errors()[0]
        key = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-")
        given = f"{key}={first['input']}: " if first["loc"] else ""
        raise ConfigError(f"{given}{first['msg']}") from error
    for split in SPLITS:
        path = args.out / f"{split}.parquet"
        rows = make_rows(task, split)
        write_rows(rows, path)
        print(f"{path}\n{length_table(rows)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, and prints a user's mistake as one line."""
    try:
        run(parse_args(argv))
    except SlipstreamError as error:
        print(f"slipstream: {error}", file=sys.stderr)
        return error.exit_code
    return 0

"""The `slipstream` command.

Invariants: every user mistake is one line per mistake on stderr and exit code 2, never a traceback; a dry
run, a help text and a list of benches import neither torch nor ray, so the heavy imports stay inside the
functions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from slipstream.trainer.errors import ConfigError, SlipstreamError

USAGE = """usage: slipstream COMMAND ...

Lossless acceleration of the rollout phase of RL post-training.

commands:
  train OVERRIDES...   run a job; `slipstream train --help` for its options
  bench [NAME]         answer one of the experiments' questions; without NAME, list them
  workers RUN [N]      let rollout workers join or leave a running job
  cluster check ...    ask every node of the Ray cluster whether a job can run there
  sft ...              supervised warm start of a policy
  data ...             write a built-in task as parquet
  --version            print the version

examples:
  slipstream train experiment=quickstart
  slipstream train experiment=quickstart drafter=off algo.num_steps=8 --dry-run
  slipstream train --resume runs/quickstart-20260131-120000
"""

TRAIN_EXAMPLES = """examples:
  slipstream train experiment=quickstart                     a real job on a laptop's CPU, in minutes
  slipstream train experiment=quickstart drafter=ngram       the same samples, other drafts
  slipstream train experiment=gsm8k_one_gpu --dry-run        what would run, without running it
  slipstream train experiment=quickstart --resume            carry on the newest run of this experiment
"""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are ConfigErrors, not a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; allowed: see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except SlipstreamError as error:
        for line in str(error).splitlines():
            print(f"slipstream: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("slipstream: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"slipstream {version('slipstream')}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "bench": _bench,
        "workers": _workers,
        "cluster": _cluster,
        "sft": _sft,
        "data": _data,
    }
    if command not in commands:
        from slipstream.conf.describe import nearest

        close = nearest(command, commands)
        raise ConfigError(f"{command}: no such command; allowed: {', '.join(commands)}; nearest: {close}")
    return commands[command](rest)


def _train(arguments: list[str]) -> int:
    args = _train_parser().parse_intermixed_args(arguments)
    resume, overrides = _split_resume(args.resume, args.overrides)
    from slipstream.trainer.config import check_paths
    from slipstream.trainer.run_folder import open_run_dir, resolve_job

    job = resolve_job(overrides, resume, args.config_dir)
    if args.print_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(job.settings.model_dump(mode="json")), end="")
        return 0
    check_paths(job.settings)
    if args.dry_run:
        from slipstream.trainer.plan import format_plan, make_plan

        print(format_plan(make_plan(job.settings)))
        return 0
    open_run_dir(job)
    from slipstream.trainer.job import run_job

    return run_job(job.settings, job.run_dir, job.resume)


def _bench(arguments: list[str]) -> int:
    from slipstream.experiments import bench

    return bench.main(arguments)


def _workers(arguments: list[str]) -> int:
    from slipstream.trainer import resize

    return resize.main(arguments)


def _cluster(arguments: list[str]) -> int:
    from slipstream.trainer import cluster_check

    return cluster_check.main(arguments)


def _sft(arguments: list[str]) -> int:
    from slipstream.trainer import sft

    return sft.main(arguments)


def _data(arguments: list[str]) -> int:
    from slipstream.trainer.data import make

    return make.main(arguments)


def _train_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="slipstream train",
        description="Runs a job. KEY=VALUE sets a key, GROUP=CHOICE a file of conf/GROUP; later ones win.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="KEY=VALUE or GROUP=CHOICE")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--print-config", action="store_true", help="print all keys with their values as YAML")
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="a folder with more choices, laid out like conf/"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN_DIR",
        help="carry on a run from its last checkpoint; without RUN_DIR the newest one of the experiment",
    )
    return parser


def _split_resume(resume: str | None, overrides: list[str]) -> tuple[str | None, list[str]]:
    """`--resume experiment=quickstart` means no folder: argparse hands over the next word all the same."""
    if resume and "=" in resume and not Path(resume).is_dir():
        return "", [resume, *overrides]
    return resume, overrides

"""Makes a recording of the rollouts of a finished training run.

`python -m slipstream.experiments.drafter_index.record --run runs/quickstart-... --out PATH`

Invariant: the file holds every response of the run that ended by itself or at its limit: what the job's own drafter
remembered.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.drafter.base import HistoryRecord
from slipstream.experiments.drafter_index.recorded import Recording
from slipstream.trainer.config import model_folder, validate
from slipstream.trainer.data.prompts import Prompt, load_prompts
from slipstream.trainer.data.tokenizer import load_tokenizer
from slipstream.trainer.errors import ConfigError, SlipstreamError
from slipstream.trainer.main import OneLineParser
from slipstream.trainer.run_folder import SETTINGS_FILE
from slipstream.trainer.tracking import ROLLOUTS_FILE

COMMAND = "python -m slipstream.experiments.drafter_index.record"


def record_run(run: Path) -> Recording:
    """The rollouts of a run folder. ConfigError when it is none, or when its data has changed since."""
    try:
        saved = json.loads((run / SETTINGS_FILE).read_bytes())
        rows = [json.loads(line) for line in (run / ROLLOUTS_FILE).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run {run}: {error}; allowed: the folder of a finished run") from None
    prompts = {prompt.prompt_id: prompt.tokens for prompt in training_prompts(saved)}
    try:
        records = [
            HistoryRecord(row["prompt_id"], row["step"], row["uid"], np.array(row["tokens"], np.int32))
            for row in rows
            if row["finish"] in ("stop", "length")
        ]
        return Recording(prompts, records)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"--run {run}: {error}; allowed: a finished run whose data is as it was") from None


def training_prompts(saved: Mapping[str, Any]) -> list[Prompt]:
    """The prompts that a job with these settings, a plain tree, trains on. ConfigError as when the job starts."""
    settings = validate(saved)
    tokenizer = load_tokenizer(model_folder(settings.model.path) or settings.model.path)
    return load_prompts(settings.data, tokenizer, settings.run.seed).train


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, and prints a user's mistake as one line."""
    parser = OneLineParser(prog=COMMAND, description="Makes a recording of the rollouts of a finished training run.")
    parser.add_argument("--run", type=Path, required=True, help="the run folder")
    parser.add_argument("--out", type=Path, required=True, help="the file to write (.npz)")
    try:
        args: argparse.Namespace = parser.parse_args(argv)
        if not args.out.absolute().parent.is_dir():
            raise ConfigError(f"--out {args.out}: no such folder; allowed: a file in an existing folder")
        recording = record_run(args.run)
        recording.save(args.out)
    except SlipstreamError as error:
        print(f"slipstream: {error}", file=sys.stderr)
        return error.exit_code
    tokens = sum(len(record.tokens) for record in recording.records)
    print(f"{args.out}: {len(recording.prompts)} prompts, {len(recording.records):,} rollouts, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

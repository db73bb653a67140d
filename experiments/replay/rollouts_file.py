"""Reads the rollouts.jsonl that every job writes, with the prompts that its settings regenerate.

Invariant: a step that was torn by a crash or lacks a prompt is an error in one line, never a silent hole.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from slipstream.drafter.base import HistoryRecord
from slipstream.experiments.drafter_index.record import training_prompts
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.run_folder import SETTINGS_FILE
from slipstream.trainer.tracking import ROLLOUTS_FILE


def read_run(run: Path) -> tuple[dict[str, np.ndarray], list[list[HistoryRecord]]]:
    """(prompt tokens by id, finished rollouts step by step) of a run folder. ConfigError when it is none."""
    try:
        saved = json.loads((run / SETTINGS_FILE).read_bytes())
        rows = [json.loads(line) for line in (run / ROLLOUTS_FILE).read_text(encoding="utf-8").splitlines()]
        prompts = {prompt.prompt_id: prompt.tokens for prompt in training_prompts(saved)}
        steps: dict[int, list[HistoryRecord]] = {}
        for row in rows:
            if row["finish"] in ("stop", "length") and row["tokens"]:
                record = HistoryRecord(
                    row["prompt_id"],
                    row["step"],
                    row["uid"],
                    np.array(row["tokens"], np.int32),
                    censored=row["finish"] == "length",
                )
                if record.prompt_id not in prompts:
                    raise ValueError(f"prompt {record.prompt_id} is not among the run's prompts")
                steps.setdefault(row["step"], []).append(record)
        if not steps:
            raise ValueError(f"{ROLLOUTS_FILE} holds no finished rollout")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--run {run}: {error}; allowed: the folder of a finished run") from None
    return prompts, [steps[step] for step in sorted(steps)]

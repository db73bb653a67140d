"""What a checkpoint holds besides the learner's files: position, history, lengths, W&B run.

Invariants: plain JSON and safetensors, no pickle; everything that changes a later token is here or is a pure function
of the settings and the step (uids, noise, prompt order).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from slipstream.drafter.history import HistoryLog
from slipstream.trainer.errors import CheckpointError

STATE_FILE, HISTORY_FILE = "job.json", "history.safetensors"


@dataclass(slots=True)
class JobState:
    """step: last finished training step; predicted_lengths: expected response tokens per prompt_id; history: the
    drafter's memory; wandb_run_id: the run to continue."""

    history: HistoryLog
    step: int = 0
    predicted_lengths: dict[str, float] = field(default_factory=dict)
    wandb_run_id: str | None = None

    def observe_lengths(self, prompt_ids: list[str], lengths: np.ndarray) -> None:
        """The newest visit's longest response predicts the next visit's: it decides when the group is done."""
        for prompt_id in set(prompt_ids):
            mine = [n for name, n in zip(prompt_ids, lengths, strict=True) if name == prompt_id]
            self.predicted_lengths[prompt_id] = float(max(mine))

    def save(self, folder: Path) -> None:
        """Writes job.json and history.safetensors."""
        save_file(self.history.to_arrays(), folder / HISTORY_FILE)
        state = {
            "step": self.step,
            "predicted_lengths": self.predicted_lengths,
            "wandb_run_id": self.wandb_run_id,
        }
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, window_epochs: int) -> JobState:
        """Reads what `save` wrote; CheckpointError names the file that does not fit."""
        history = HistoryLog(window_epochs)
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            history.add(HistoryLog.from_arrays(load_file(folder / HISTORY_FILE)))
            return cls(history, state["step"], state["predicted_lengths"], state["wandb_run_id"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} cannot be read: {error}") from error

"""What a job carries from step to step besides the weights: position, history, lengths, W&B run.

Invariants
- Plain JSON and the token log, no pickle; everything that changes a later token is here or is a pure function of the
  settings and the step (uids, noise, prompt order).
- The rollouts of a step are in the log of the run folder before the step ends. A checkpoint holds the log's position
  at its step, and the log is on disk up to there before the checkpoint is complete.
- A resumed job remembers what the checkpoint's job remembered: the log is cut back to the position, and the window is
  filled from it again. The cut steps are sampled again.
"""

from __future__ import annotations

import json
import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.history import HistoryLog
from slipstream.drafter.token_log import LogError, LogPosition, TokenLog
from slipstream.rollout.learned import Learned, Observed, observe_records
from slipstream.trainer.errors import CheckpointError

STATE_FILE, LOG_FOLDER = "job.json", "history"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """A job's state at the end of a step. text: of job.json; visits: (prompt_id, step) that the window held."""

    step: int
    text: str
    visits: frozenset[tuple[str, int]]

    def save(self, folder: Path) -> None:
        """Writes job.json into a checkpoint's folder; from any thread."""
        (folder / STATE_FILE).write_text(self.text, encoding="utf-8")

    def remembers(self, record: HistoryRecord) -> bool:
        """Whether a job that starts from here, or has gone on from here, may need the record."""
        return record.step > self.step or (record.prompt_id, record.step) in self.visits


@dataclass(slots=True)
class JobState:
    """history: the drafter's memory; log: the same on disk, and what fell out of the window since; step: last finished
    training step; predicted_lengths: expected response tokens per prompt_id; wandb_run_id: the run to continue;
    learned: what was measured of drafts, costs and lengths; next_group: the first group of the job that was never
    started; outstanding_groups: started, but not trained on, dropped or closed: a resumed job starts them again, same
    uids."""

    history: HistoryLog
    log: TokenLog
    step: int = 0
    predicted_lengths: dict[str, float] = field(default_factory=dict)
    wandb_run_id: str | None = None
    learned: Learned = field(default_factory=Learned)
    next_group: int = 0
    outstanding_groups: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, run_dir: Path, window_epochs: int) -> JobState:
        """Step 0 with nothing remembered; a log that lies in the run folder belongs to no checkpoint and goes."""
        folder = Path(run_dir) / LOG_FOLDER
        try:
            return cls(HistoryLog(window_epochs), TokenLog.create(folder))
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error

    def remember(self, records: list[HistoryRecord]) -> None:
        """Takes the rollouts of one step into the window and the log; CheckpointError when they cannot be written."""
        self.history.add(records)
        if self.learned.lengths is not None:
            observe_records(self.learned.lengths, records)
        try:
            self.log.append(records)
        except OSError as error:
            raise CheckpointError(f"{self.log.folder} cannot be written: {error.strerror or error}") from error

    def observe_lengths(self, prompt_ids: list[str], lengths: np.ndarray) -> None:
        """The newest visit's longest response predicts the next visit's: it decides when the group is done."""
        for prompt_id in set(prompt_ids):
            mine = [n for name, n in zip(prompt_ids, lengths, strict=True) if name == prompt_id]
            self.predicted_lengths[prompt_id] = float(max(mine))

    def observe_step(self, observed: list[Observed]) -> dict[str, float]:
        """Adds what the workers observed in a step to what fades; the step's own calibration metrics."""
        return self.learned.observe(observed).metrics()

    def save(self, folder: Path) -> None:
        """Writes the state as it is now into a checkpoint's folder."""
        self.snapshot().save(folder)

    def snapshot(self) -> StateSnapshot:
        """The state of now, whatever becomes of it; brings the log to disk."""
        self.log.sync()
        state = {
            "step": self.step,
            "predicted_lengths": self.predicted_lengths,
            "wandb_run_id": self.wandb_run_id,
            "log_end": self.log.position,
            "next_group": self.next_group,
            "outstanding_groups": self.outstanding_groups,
            "learned": self.learned.to_arrays(),
        }
        visits = frozenset((record.prompt_id, record.step) for record in self.history)
        return StateSnapshot(self.step, json.dumps(state), visits)

    def drop_forgotten(self, snapshot: StateSnapshot) -> None:
        """Deletes log segments that the snapshot's window has left behind, once its checkpoint is complete.

        A failure costs disk space only: a warning.
        """
        try:
            self.log.drop_segments(snapshot.remembers)
        except (OSError, LogError) as error:
            _log.warning("an old part of the drafter's history cannot be removed: %s", error)

    @classmethod
    def load(cls, checkpoint: Path, run_dir: Path, window_epochs: int) -> JobState:
        """The state that `save` wrote, with the run's log cut back to it; CheckpointError names what does not fit."""
        path = checkpoint / STATE_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            segment, offset = state["log_end"]
            end = LogPosition(int(segment), int(offset))
            learned = Learned.from_arrays(state["learned"])
            groups = int(state["next_group"]), [int(number) for number in state["outstanding_groups"]]
            rest = state["step"], state["predicted_lengths"], state["wandb_run_id"], learned, *groups
        except KeyError as error:
            raise CheckpointError(f"{path} cannot be read: it has no {error}") from error
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        history = HistoryLog(window_epochs)
        log = _open_log(checkpoint, Path(run_dir) / LOG_FOLDER, end)
        history.add(log.records())
        return cls(history, log, *rest)


def _open_log(checkpoint: Path, folder: Path, end: LogPosition) -> TokenLog:
    """The log up to `end`. A folder that was emptied on purpose gives an empty log, one that is not there an error."""
    try:
        if folder.is_dir() and not any(folder.glob("*.log")):
            _log.warning("%s holds no log: the drafter starts cold, the samples stay the same", folder)
            # Earlier checkpoints hold positions of the log that was here: none of them may lie in the new one.
            return TokenLog.create(folder, first_segment=end.segment + 1)
        return TokenLog.open(folder, end)
    except (OSError, LogError) as error:
        name = shlex.quote(str(folder))
        raise CheckpointError(
            f"{checkpoint} cannot be resumed: {error}; to carry on with the same samples and a drafter that starts "
            f"cold: rm -rf {name} && mkdir {name}"
        ) from error

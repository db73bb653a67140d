"""When and by whom checkpoints are written: by the caller, or in the background while training goes on.

Invariants
- What is written is the state at the end of the step that `save` was called for, whatever has happened since: the
  learner's tensors are copied, the job's state is text, before `save` returns.
- At most one checkpoint is being written; the next one waits for it, with a deadline.
- A background checkpoint is begun after its step was logged, and an error of it is raised at the next step boundary:
  a job that cannot save stops, with the earlier checkpoints as they were, instead of training on what it would lose.
"""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from slipstream.conf.schema import CheckpointConfig
from slipstream.rollout.actors import PoolError, PoolTimeout
from slipstream.trainer import checkpoint
from slipstream.trainer.errors import SlipstreamError
from slipstream.trainer.job_state import JobState, StateSnapshot

if TYPE_CHECKING:
    from slipstream.trainer.learner_group import LearnerCall, LearnerGroup


class CheckpointSaver:
    """Saves one job. files: copied into the policy's folder; ask: waits for a call."""

    def __init__(
        self,
        config: CheckpointConfig,
        run_dir: Path,
        learner: LearnerGroup,
        files: list[Path],
        ask: Callable[[LearnerCall], Any],
    ) -> None:
        self._config, self._run_dir, self._learner, self._files, self._ask = config, run_dir, learner, files, ask
        self._prepared: tuple[StateSnapshot, float | None] | None = None
        self._writing: _Writing | None = None
        self._warned = False

    def save(self, state: JobState, metrics: dict[str, float]) -> dict[str, float]:
        """Takes the state of a finished step; metrics of this, and of a write that it had to wait for.

        metrics: of the step, for keep_best. asynchronous: `start` begins the writing; else it is written on return.
        """
        started = time.perf_counter()
        waited = self.finish(state)
        value = self._value(metrics, state.step)
        if not self._config.asynchronous:
            snapshot = state.snapshot()
            self._write(snapshot, value, self._ask_learner)
            state.drop_forgotten(snapshot)
        else:
            self._ask(self._learner.snapshot(self._config.timeout_s))
            self._prepared = state.snapshot(), value
        return waited | {"timing_s/save_checkpoint": time.perf_counter() - started}

    def start(self) -> None:
        """Begins to write what `save` took, if it did not write it."""
        if self._prepared is None:
            return
        (snapshot, value), self._prepared = self._prepared, None
        self._writing = _Writing(snapshot, lambda: self._write(snapshot, value, self._save_aside))

    def poll(self, state: JobState) -> dict[str, float]:
        """At a step boundary: raises what went wrong in the background, or metrics of a write that has ended."""
        if self._writing is None or not self._writing.ended():
            return {}
        done, self._writing = self._writing, None
        done.result()
        state.drop_forgotten(done.snapshot)
        return {"timing_s/write_checkpoint": done.seconds}

    def finish(self, state: JobState) -> dict[str, float]:
        """`poll` once nothing is being written any more; PoolTimeout after the deadline."""
        if self._writing is not None and not self._writing.join(self._config.timeout_s):
            step, timeout_s = self._writing.snapshot.step, self._config.timeout_s
            raise PoolTimeout(f"checkpoint of step {step}: waited checkpoint.timeout_s={timeout_s:g} s for its end")
        return self.poll(state)

    def close(self, timeout_s: float) -> None:
        """For a job that ends early: waits that long for a checkpoint under way, and says what became of it."""
        if self._writing is None:
            return
        step = self._writing.snapshot.step
        if not self._writing.join(timeout_s):
            print(f"the checkpoint of step {step} was not complete after {timeout_s:g} s: given up", file=sys.stderr)
            return
        done, self._writing = self._writing, None
        try:
            done.result()
        except SlipstreamError as error:
            print(error, file=sys.stderr)

    @property
    def step(self) -> int | None:
        """The step whose checkpoint is being written."""
        return None if self._writing is None else self._writing.snapshot.step

    def _value(self, metrics: dict[str, float], step: int) -> float | None:
        config = self._config
        value = metrics.get(config.best_metric)
        if config.keep_best and value is None and not self._warned:
            self._warned = True
            print(
                f"checkpoint.best_metric={config.best_metric}: step {step} has no such metric, its checkpoint is no "
                f"candidate for checkpoint.keep_best; in this step: {', '.join(sorted(metrics))}",
                file=sys.stderr,
            )
        return value if value is not None and math.isfinite(value) else None

    def _write(self, snapshot: StateSnapshot, value: float | None, save: Callable[[Path], None]) -> None:
        config = self._config

        def write(folder: Path) -> None:
            save(folder)
            for path in self._files:
                shutil.copy(path, folder / "policy" / path.name)
            snapshot.save(folder)

        best = checkpoint.Best(config.best_metric, config.best_mode, config.keep_best, value)
        checkpoint.save(self._run_dir, snapshot.step, write, config.keep_last, best)

    def _ask_learner(self, folder: Path) -> None:
        call = self._learner.save(str(folder.resolve()), self._config.timeout_s)
        _unwrapped(lambda: self._ask(call))

    def _save_aside(self, folder: Path) -> None:
        _unwrapped(self._learner.save_aside(str(folder.resolve()), self._config.timeout_s).result)


class _Writing:
    """One checkpoint on its way to disk, in a thread that never outlives the process."""

    def __init__(self, snapshot: StateSnapshot, write: Callable[[], None]) -> None:
        self.snapshot, self._write = snapshot, write
        self.seconds = 0.0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"checkpoint {snapshot.step}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._write()
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - started

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Whether it has ended within that time."""
        self._thread.join(timeout_s)
        return self.ended()

    def result(self) -> None:
        if self._error is not None:
            raise self._error


def _unwrapped(ask: Callable[[], Any]) -> None:
    """A full disk at the learner's is the same as one here: the checkpoint says what is missing."""
    try:
        ask()
    except PoolError as error:
        cause = getattr(error.__cause__, "cause", None)
        if isinstance(cause, OSError | SafetensorError):
            raise cause from error
        raise

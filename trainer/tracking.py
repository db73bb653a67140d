"""Where a job's numbers go: metrics.jsonl, rollouts.jsonl and Weights & Biases.

Invariants
- metrics.jsonl is the record: one JSON object per step, on disk before `log` returns. Weights & Biases is a
  copy, and its failure never stops a job that is under way.
- A line is whole or it is counted as bad: a crash in the middle of a line spoils that line alone.
- JSON here is strict: a number that is not finite is written as null and counted in the same record.
- wandb is imported only when it is used; it prints nothing, and what it writes stays in the run folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from slipstream.conf.schema import TrackingConfig
from slipstream.trainer.errors import SlipstreamError

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
STEP_KEY = "training/global_step"
WANDB_START_TIMEOUT_S = 60.0
WANDB_FINISH_TIMEOUT_S = 120.0

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Tracker:
    """Writes one job's metrics and rollouts; one instance per run folder at a time."""

    def __init__(
        self,
        run_dir: Path,
        settings_dict: dict[str, Any],
        tracking: TrackingConfig,
        wandb_run_id: str | None = None,
    ) -> None:
        """Opens the run; `wandb_run_id` from a checkpoint makes Weights & Biases continue that run.

        Raises SlipstreamError when Weights & Biases is asked for and cannot start.
        """
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.wandb_run_id: str | None = wandb_run_id
        self.num_wandb_errors = 0
        self._run: Any = None
        if tracking.mode != "disabled":
            self.wandb_run_id = wandb_run_id or secrets.token_hex(4)
            self._run = _start_wandb(self.run_dir, settings_dict, tracking, self.wandb_run_id)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Appends the record of one step (1-based) and sends it to Weights & Biases.

        Adds tracking/num_nonfinite (values of this record written as null) and tracking/num_wandb_errors
        (failed calls since the start). Raises SlipstreamError when the file cannot be written.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._send(lambda run: run.log({**numbers, STEP_KEY: step}))
        record = {
            "step": int(step),
            **finite,
            "tracking/num_nonfinite": sum(value is None for value in finite.values()),
            "tracking/num_wandb_errors": self.num_wandb_errors,
        }
        append_jsonl(self.run_dir / METRICS_FILE, [record])

    def log_rollouts(self, records: Iterable[dict[str, Any]]) -> None:
        """Appends rollout records; numpy values are fine, numbers that are not finite become null."""
        append_jsonl(self.run_dir / ROLLOUTS_FILE, records)

    def truncate_after(self, step: int) -> int:
        """Drops the records of later steps, and lines that are not records, from both files; returns how
        many.

        Called on resume from the checkpoint of `step`: what comes after will be written again.
        """
        return sum(_truncate(self.run_dir / name, step) for name in (METRICS_FILE, ROLLOUTS_FILE))

    def finish(self, exit_code: int = 0) -> None:
        """Closes the Weights & Biases run with the job's exit code; calling it twice is fine."""
        self._send(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _send(self, call: Callable[[Any], None]) -> None:
        """Runs `call` on the Weights & Biases run, if there is one; a failure is said once and counted."""
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self.num_wandb_errors += 1
            if self.num_wandb_errors == 1:
                _log.warning(
                    "Weights & Biases failed: %s; the job goes on, %s is complete, and later failures are "
                    "only counted in tracking/num_wandb_errors",
                    _first_line(error),
                    self.run_dir / METRICS_FILE,
                )


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All records of a file, and how many lines are none (torn by a crash); ([], 0) without a file."""
    return scan_jsonl(path, lambda record: record)


def scan_jsonl(path: Path, pick: Callable[[dict[str, Any]], T]) -> tuple[list[T], int]:
    """Like `read_jsonl`, but keeps only `pick(record)`: rollout files do not fit into memory."""
    picked: list[T] = []
    num_bad = 0
    for _, record in _lines(path):
        if record is None:
            num_bad += 1
        else:
            picked.append(pick(record))
    return picked, num_bad


def append_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends one strict JSON line per record and hands them to the operating system in one write.

    Raises SlipstreamError naming the file when it cannot be written, TypeError for a value JSON does not
    know.
    """
    text = "".join(json.dumps(_plain(record), allow_nan=False) + "\n" for record in records)
    try:
        with open(path, "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                # A line torn by a crash would swallow the first new record.
                if file.read(1) != b"\n":
                    text = "\n" + text
            file.write(text.encode())
    except OSError as error:
        raise SlipstreamError(f"{path} cannot be written: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each non-empty line with its record, or None where it is not a JSON object; nothing without a file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield line, record if isinstance(record, dict) else None


def _truncate(path: Path, step: int) -> int:
    """Rewrites the file without what comes after `step`; the old file stands until the new one is on disk."""
    if not path.exists():
        return 0
    temporary = path.with_name(f".{path.name}.tmp")
    num_dropped = 0
    try:
        with open(temporary, "wb") as file:
            for line, record in _lines(path):
                if record is None or not isinstance(record.get("step"), int) or record["step"] > step:
                    num_dropped += 1
                else:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SlipstreamError(f"{path} cannot be shortened: {error.strerror or error}") from error
    return num_dropped


def _plain(value: Any) -> Any:
    """`value` as strict JSON data: numpy becomes Python, a number that is not finite becomes None."""
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case list() | tuple():
            # Token lists are long and hold only integers: nothing in them needs a visit each.
            return list(value) if all(type(item) is int for item in value) else [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
    return value


def _start_wandb(run_dir: Path, settings_dict: dict[str, Any], tracking: TrackingConfig, run_id: str) -> Any:
    """The Weights & Biases run, or one SlipstreamError line that names the way out."""
    try:
        with _wandb_environment(run_dir):
            import wandb

            if tracking.mode == "online" and not wandb.api.api_key and not wandb.Settings().identity_token_file:
                # wandb would ask on the terminal, where nobody may be watching a long job start.
                raise SlipstreamError("no API key is configured (run `wandb login` or set WANDB_API_KEY)")
            run = wandb.init(
                project=tracking.project,
                entity=tracking.entity,
                group=tracking.group,
                tags=list(tracking.tags),
                name=run_dir.resolve().name,
                id=run_id,
                # Offline there is no server to resume from: the id alone ties the parts together on upload.
                resume="allow" if tracking.mode == "online" else None,
                mode=tracking.mode,
                dir=str(run_dir),
                config=settings_dict,
                settings=wandb.Settings(**_wandb_settings(wandb)),
            )
            # W&B's own step counter restarts with the process; charts follow the training step instead.
            run.define_metric(STEP_KEY)
            run.define_metric("*", step_metric=STEP_KEY)
            return run
    except Exception as error:
        raise SlipstreamError(
            f"tracking.mode={tracking.mode}: Weights & Biases could not start: {_first_line(error)}; "
            "tracking.mode=disabled runs without it"
        ) from error


def _wandb_settings(wandb: Any) -> dict[str, Any]:
    """No capture of console, code or machine, and a deadline for every wait."""
    wanted = {
        "console": "off",
        "disable_git": True,
        "disable_code": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_save_requirements": False,
        "init_timeout": WANDB_START_TIMEOUT_S,
        "finish_timeout": WANDB_FINISH_TIMEOUT_S,
        "finish_timeout_raises": True,
    }
    # The supported releases of wandb know different subsets and refuse unknown names.
    return {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}


@contextmanager
def _wandb_environment(run_dir: Path) -> Iterator[None]:
    """Variables that wandb reads before it sees any settings: silence, and a cache inside the run."""
    wanted = {"WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(run_dir / "wandb" / "cache")}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

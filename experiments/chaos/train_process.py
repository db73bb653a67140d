"""A job as a user runs it: `slipstream train`, then `slipstream train --resume`, one process life after the other.

Invariants: every life has files of its own for stdout and stderr; how far the job is, is read from its run folder
alone; a life that ends badly is judged by what it left on stderr.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

COMMAND = "import sys; from slipstream.trainer.main import main; sys.exit(main())"
STOP_LINES = ("slipstream: ", "interrupted after step ")
STACKS_TIMEOUT_S = 20.0


class TrainProcess:
    """One job in `run_dir`; `start` begins its next life."""

    def __init__(self, overrides: Sequence[str], run_dir: Path, logs: Path, environment: Mapping[str, str]) -> None:
        """overrides: of the first life; run_dir: where they put the run; logs: a folder for the output."""
        self.run_dir, self._overrides, self._logs = run_dir, list(overrides), logs
        # A process that is ended by SIGABRT then leaves the stacks of its threads.
        self._environment = dict(environment) | {"PYTHONFAULTHANDLER": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self.num_lives = 0

    def start(self) -> None:
        """The first life, or the next one as a resume."""
        self.num_lives += 1
        begun = (self.run_dir / "settings.json").is_file()
        arguments = ["train", "--resume", str(self.run_dir)] if begun else ["train", *self._overrides]
        with self._log("out").open("wb") as out, self._log("err").open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *arguments],
                cwd=self._logs,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self._environment,
            )

    def _log(self, name: str) -> Path:
        return self._logs / f"life-{self.num_lives:03d}.{name}"

    @property
    def pid(self) -> int:
        """Of this life."""
        assert self._process is not None
        return self._process.pid

    def ended(self) -> int | None:
        """The exit code of this life, None while it goes on."""
        assert self._process is not None
        return self._process.poll()

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl, 0 without one; a half-written line does not count."""
        try:
            with (self.run_dir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
                lines = file.read().split(b"\n")[:-1]
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (OSError, ValueError, KeyError):
            return 0

    def errors(self) -> str:
        """What this life wrote to stderr."""
        return self._log("err").read_text(encoding="utf-8", errors="replace")

    def stop_line(self) -> str | None:
        """The one line that says why this life ended; None when there is none, several, or a traceback."""
        text = self.errors()
        lines = [line for line in text.splitlines() if line.startswith(STOP_LINES)]
        return lines[0] if len(lines) == 1 and "Traceback (most recent call last)" not in text else None

    def kill(self, stacks: bool = False) -> None:
        """Ends this life; with `stacks` those of its threads go to stderr first."""
        assert self._process is not None
        if stacks and self._process.poll() is None:
            self._process.send_signal(signal.SIGABRT)
            try:
                self._process.wait(STACKS_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

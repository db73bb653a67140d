"""Ends a job that does not get on, after it wrote down where everybody is.

Invariants
- As long as `progress` is called at least every timeout_s seconds nothing happens, and nothing is asked of anybody.
- A stall leaves `stall.txt` in the run folder, written before the job ends, even when no actor answers: what happened
  last, the stacks of the driver and of every actor, and what the source says is in flight.
- One stall is reported once; the main thread is interrupted wherever it waits, and also where SIGINT is ignored: a
  shell script starts what it puts into the background like that. SIGALRM is the watchdog's while it watches.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slipstream.rollout.stacks import thread_stacks

STALL_FILE = "stall.txt"
ANSWER_TIMEOUT_S = 10.0
"""How long the actors have to answer."""


class Watchdog:
    """A thread that watches the time since the last progress; a context manager."""

    def __init__(self, timeout_s: float, run_dir: Path, interrupt: Callable[[], None] | None = None) -> None:
        """timeout_s: 0 never barks. interrupt: what ends the job, by default a KeyboardInterrupt in the main thread,
        from where the watchdog must then be entered."""
        self._timeout_s, self._file, self._interrupt = timeout_s, Path(run_dir) / STALL_FILE, interrupt
        self._last, self._what = time.monotonic(), "the start"
        self._describe: list[Callable[[], str]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._handler_before: Any = None
        self.stalled: str | None = None

    def __enter__(self) -> Watchdog:
        if self._timeout_s > 0:
            self._last = time.monotonic()
            if self._interrupt is None:
                self._handler_before = signal.signal(signal.SIGALRM, signal.default_int_handler)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * ANSWER_TIMEOUT_S)
            if self._interrupt is None:
                signal.signal(signal.SIGALRM, self._handler_before)

    def progress(self, what: str) -> None:
        """Something finished. Cheap, from any thread."""
        self._last, self._what = time.monotonic(), what

    def describe(self, function: Callable[[], str]) -> None:
        """Adds a part to the report; `function` must answer within ANSWER_TIMEOUT_S and may fail."""
        self._describe.append(function)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._timeout_s / 4)):
            silent_s = time.monotonic() - self._last
            if silent_s > self._timeout_s:
                self.stalled = (
                    f"no progress for {silent_s:.0f} s (watchdog.timeout_s={self._timeout_s:g}); the last was "
                    f"{self._what}; who waits for whom: {self._file}"
                )
                self._write()
                (self._interrupt or _interrupt_main)()
                return

    def _write(self) -> None:
        parts = [str(self.stalled), f"driver, {thread_stacks()}"]
        self._file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        for function in self._describe:
            try:
                parts.append(function())
            except Exception as error:  # a report with a gap is better than none
                parts.append(f"{type(error).__name__}: {error}")
        self._file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _interrupt_main() -> None:
    # A signal that is really sent ends a system call that the main thread waits in.
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGALRM)

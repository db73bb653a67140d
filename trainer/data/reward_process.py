"""One helper process that runs what may hang, crash or print, under a deadline.

Invariants: one call at a time; an attempt ends within timeout_s or the process is killed and the next attempt starts
a new one; only an attempt without an answer (hung, died) is repeated; the helper dies with its parent (its pipe closes,
and an alarm ends a call that outlives the deadline); what the helper prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

START_TIMEOUT_S = 120.0
"""A user's module may import torch on a busy machine."""
STDERR = 2
"""The file descriptor: in a notebook or under a test runner sys.stderr is no file."""


class _NoAnswer(Exception):
    """An attempt that may go well another time."""


class RewardProcess:
    """Runs `math` checks, and calls `function` (a dotted path) where one is given."""

    def __init__(self, function: str | None, timeout_s: float, max_retries: int = 0) -> None:
        """timeout_s: of one attempt; max_retries: further attempts of a call that got no answer."""
        self._function = function
        self._timeout_s, self._max_retries = timeout_s, max_retries
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def start(self) -> str:
        """Starts the process unless it runs; returns what is wrong with `function`, or the empty string."""
        with self._lock:
            return self._start()

    def call(self, rule: str, *arguments: Any) -> tuple[Any, str]:
        """(value, "") or (None, reason); never raises."""
        with self._lock:
            for _ in range(self._max_retries):
                with contextlib.suppress(_NoAnswer):
                    return self._attempt(rule, arguments)
            try:
                return self._attempt(rule, arguments)
            except _NoAnswer as error:
                attempts = f" in each of {self._max_retries + 1} attempts" if self._max_retries else ""
                return None, f"{error}{attempts}"

    def _attempt(self, rule: str, arguments: tuple[Any, ...]) -> tuple[Any, str]:
        """As `call`; _NoAnswer when the process hung or died."""
        try:
            problem = self._start()
            if problem:
                return None, problem
            assert self._pipe is not None
            self._pipe.send((rule, arguments))
            if not self._pipe.poll(self._timeout_s):
                self._kill()
                raise _NoAnswer(f"the {rule} reward took longer than reward.timeout_s={self._timeout_s:g}")
            return self._pipe.recv()
        except (EOFError, OSError):
            code = self._kill()
            raise _NoAnswer(f"the process of the {rule} reward died (exit code {code})") from None
        except _NoAnswer:
            raise
        except Exception as error:
            # What cannot be pickled, either way.
            self._kill()
            return None, f"the {rule} reward could not be exchanged: {one_line(error)}"

    def stop(self) -> None:
        """Ends the process, if it runs."""
        with self._lock:
            self._kill()

    def _start(self) -> str:
        if self._process is not None and self._process.poll() is None:
            return ""
        self._kill()
        parent, child = Pipe()
        command = [
            sys.executable,
            "-m",
            __name__,
            str(child.fileno()),
            str(self._timeout_s),
            self._function or "",
        ]
        # The parent's import path and the working directory, where a user's reward file is most likely to be.
        paths = [*(path or os.getcwd() for path in sys.path), os.getcwd()]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        self._process = subprocess.Popen(
            command, pass_fds=[child.fileno()], stdin=subprocess.DEVNULL, stdout=STDERR, env=environment
        )
        child.close()
        self._pipe = parent
        try:
            problem = parent.recv() if parent.poll(START_TIMEOUT_S) else f"no answer within {START_TIMEOUT_S:g} s"
        except (EOFError, OSError):
            problem = f"its process ended while starting (exit code {self._process.wait()})"
        if problem:
            self._kill()
        return problem

    def _kill(self) -> int | None:
        process, self._process = self._process, None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if process is None:
            return None
        process.kill()
        return process.wait()

    def __del__(self) -> None:
        self._kill()


def one_line(error: BaseException) -> str:
    """`ValueError: what it said`, on one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def import_function(path: str) -> Callable[..., Any]:
    """The callable at `package.module.name`; raises ValueError with a readable line and the nearest name."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError("allowed: a dotted path package.module.function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"module {module_name!r} cannot be imported ({one_line(error)})") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [n for n in dir(module) if not n.startswith("__")], n=1, cutoff=0.4)
        hint = f"; nearest: {module_name}.{near[0]}" if near else ""
        raise ValueError(f"module {module_name!r} has no {name!r}{hint}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{name!r} is a {type(function).__name__}, not a function")
    return function


def check_math(answer: str, ground_truth: str) -> float:
    r"""1.0 when math-verify finds the answer equal to the ground truth, else 0.0; ValueError for a bad truth.

    Its own timeouts are signals and are switched off: the deadline of the process covers them.
    """
    from math_verify import parse, verify

    gold = parse(rf"\boxed{{{ground_truth}}}", parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot read the ground truth {ground_truth!r}")
    return float(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))


def serve(pipe: Connection, timeout_s: float, function: str) -> None:
    """Answers calls until the parent closes the pipe."""
    try:
        custom = import_function(function) if function else None
    except ValueError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    while True:
        try:
            rule, arguments = pipe.recv()
        except EOFError:
            return
        # The default action of SIGALRM ends the process even inside C code: nobody is left to kill an orphan.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
        try:
            run = check_math if rule == "math" else custom
            assert run is not None
            answer: tuple[Any, str] = (run(*arguments), "")
        except Exception as error:
            answer = (None, f"the {rule} reward raised {one_line(error)}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            pipe.send(answer)
        except OSError:
            return
        except Exception as error:
            pipe.send((None, f"the {rule} reward returned what cannot be pickled: {one_line(error)}"))


if __name__ == "__main__":
    import logging

    # math-verify warns once that its own timeouts are off, which is the point.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]), sys.argv[3])

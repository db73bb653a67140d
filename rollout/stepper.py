"""One thread that owns an engine and steps it as long as it has work, so that others can talk to it between steps.

Invariants
- Nobody but this thread touches the engine: calls from other threads are queued and run between two steps, in order.
- Every rollout is handed out by `poll` exactly once; every wait has a deadline and names what was waited for.
- New weights are swapped in between two steps. What becomes of the live requests is the caller's choice: `continue`
  keeps their keys and values, `recompute` computes them again under the new weights before the next token, `drain`
  admits nothing more and waits until none is live, so that every rollout is of one version.
- The first exception of the engine ends the thread and is raised from every later call.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Literal, TypeVar

import torch

from slipstream.rollout.engine import EngineError
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout

InFlight = Literal["continue", "recompute", "drain"]
R = TypeVar("R")

IDLE_WAIT_S = 1.0
"""An idle thread looks this often whether it was told to end without a signal."""


class EngineStepper:
    """Background stepping of one engine; a daemon thread, so that it never keeps a process alive."""

    def __init__(self, engine: TorchEngine, num_threads: int) -> None:
        """num_threads: torch threads of the stepping thread."""
        self._engine, self._num_threads = engine, num_threads
        self._changed = threading.Condition()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._outbox: list[Rollout] = []
        self._swap: tuple[Callable[[], Any], Future[Any]] | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self.busy_s = 0.0
        self.num_steps = 0
        self._step_began_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine stepper", daemon=True)
        self._thread.start()

    # ---- from any thread

    def submit(self, requests: Sequence[Request], timeout_s: float, first: Callable[[], None] | None = None) -> None:
        """Queues requests behind those that wait. first: done just before, between the same two steps."""

        def queue() -> None:
            if first is not None:
                first()
            self._engine.submit(requests)

        self.call(queue, f"queueing {len(requests)} requests", timeout_s)

    def abort(self, uids: Iterable[int], timeout_s: float) -> None:
        """Takes requests out; what they have comes back from `poll` with finish "abort"."""
        wanted = list(uids)
        self.call(lambda: self._deliver(self._engine.abort(wanted)), f"aborting {len(wanted)} requests", timeout_s)

    def poll(self, wait_s: float, at_least: int = 1) -> list[Rollout]:
        """What finished since the last call; waits up to `wait_s` for `at_least` rollouts."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._outbox) >= at_least or self._failure or self._closed, wait_s)
            out, self._outbox = self._outbox, []
            if not out:
                self._raise_failure()
            return out

    def update_policy(self, change: Callable[[], Any], version: int, in_flight: InFlight, timeout_s: float) -> int:
        """Swaps the weights between two steps by calling `change`; returns the version served from then on."""

        def swap() -> int:
            # A change that fails leaves the old weights, and whoever waits for a slot must go on with them.
            self._engine.admitting = True
            change()
            if in_flight == "recompute":
                self._engine.recompute_live()
            return self._engine.policy_version

        what = f"weights of version {version}"
        if in_flight != "drain":
            return self.call(swap, what, timeout_s)
        future: Future[int] = Future()

        def hold() -> None:
            if self._swap is not None:
                raise EngineError(f"{what} came while older ones wait for the live requests to drain")
            self._engine.admitting = False
            self._swap = swap, future

        self.call(hold, what, timeout_s)
        return self._result(future, f"{what}, draining", timeout_s)

    def call(self, function: Callable[[], R], what: str, timeout_s: float) -> R:
        """Runs `function` between two steps and returns its result; EngineError when the deadline passes."""
        future: Future[R] = Future()
        with self._changed:
            self._raise_failure()
            self._calls.append((function, future))
            self._changed.notify_all()
        return self._result(future, what, timeout_s)

    def close(self) -> None:
        """Ends the thread after the step it is in."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def step_s(self) -> float:
        """Seconds that the present engine step has taken so far; 0 between steps."""
        began_at = self._step_began_at
        return 0.0 if began_at is None else time.perf_counter() - began_at

    def _result(self, future: Future[R], what: str, timeout_s: float) -> R:
        try:
            return future.result(timeout_s)
        except FutureTimeout:
            live, queued = self._engine.num_live, self._engine.num_unfinished
            raise EngineError(
                f"{what}: waited {timeout_s:g} s for the engine's thread ({live} requests live, {queued} unfinished)"
            ) from None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the engine failed: {type(self._failure).__name__}: {self._failure}") from self._failure

    # ---- the thread

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            while not self._closed:
                self._run_calls()
                self._swap_when_drained()
                if self._engine.num_live or (self._engine.num_unfinished and self._engine.admitting):
                    self._step_began_at = started = time.perf_counter()
                    done = self._engine.step()
                    self._step_began_at = None
                    self.busy_s += time.perf_counter() - started
                    self.num_steps += 1
                    self._deliver(done)
                else:
                    with self._changed:
                        self._changed.wait_for(lambda: self._calls or self._closed, IDLE_WAIT_S)
        except BaseException as error:  # the callers must hear of everything that ends this thread
            self._fail(error)

    def _run_calls(self) -> None:
        while True:
            with self._changed:
                if not self._calls:
                    return
                function, future = self._calls.popleft()
            _settle(function, future)

    def _swap_when_drained(self) -> None:
        if self._swap is not None and not self._engine.num_live:
            swap, self._swap = self._swap, None
            _settle(*swap)

    def _deliver(self, rollouts: list[Rollout]) -> None:
        if rollouts:
            with self._changed:
                self._outbox += rollouts
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            waiting = [future for _, future in self._calls] + ([self._swap[1]] if self._swap else [])
            self._calls.clear()
            self._changed.notify_all()
        for future in waiting:
            future.set_exception(EngineError(f"the engine failed: {type(error).__name__}: {error}"))


def _settle(function: Callable[[], Any], future: Future[Any]) -> None:
    """A call that fails is its caller's error, not the engine's."""
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)

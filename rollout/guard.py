"""Speculation that loses is found and switched off: the gain, measured while it runs.

How it is measured: alternating, not counterfactual. Of every block of steps in which drafting is wanted, one, drawn at
random, runs without drafts. A block compares the seconds that this step took, times the progress that the others made,
with the seconds that the others took: what the same progress would have cost without drafts. Which step is held out
depends on nothing but a counter, so the held-out step is a fair sample of its block and no model of costs or of
acceptance enters (a counterfactual would inherit their errors, and those are what a guard is for). A step counts by
what was wanted, not by what the drafter found: its own time and its empty answers are in the measurement. Progress is
the P(last)-weighted mean of tokens gained per request, because that is what shortens a batch; it is 1 without drafts.

Invariants: the gain is a ratio of sums over blocks, its interval the usual one of a ratio estimator; speculation goes
off when the whole interval is below zero, and comes back for a trial after `wait` steps, twice as many each time; both
are logged. Steps with prompt tokens are left out: known before the draw, hence no bias.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BLOCK, LONG_BLOCK, TRIAL_BLOCK = 32, 256, 8
MIN_BLOCKS = 6
Z = 1.96
FADE_PER_BLOCK = 0.98
FIRST_WAIT, LONGEST_WAIT = 512, 16384
NUM_SUMS = 6

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Gain:
    """Share of the time saved by drafting, with its 95 % interval, from `blocks` blocks; NaN before MIN_BLOCKS."""

    value: float
    low: float
    high: float
    blocks: float


@dataclass(frozen=True, slots=True)
class GuardState:
    """What a guard knows between two blocks. sums: over blocks, as in Guard; wait, waited: steps; the rest counts."""

    sums: tuple[float, ...]
    speculating: bool
    trial: bool
    wait: int
    waited: int
    switched_off: int
    retries: int
    held_out: int

    def to_arrays(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> GuardState:
        """What `to_arrays` wrote; KeyError or ValueError name what is missing or impossible."""
        sums = tuple(float(value) for value in arrays["sums"])
        names = ("wait", "waited", "switched_off", "retries", "held_out")
        counts = [int(arrays[name]) for name in names]
        if len(sums) != NUM_SUMS or not np.isfinite(sums).all():
            raise ValueError(f"guard sums are {sums}; allowed: {NUM_SUMS} finite numbers")
        if min(counts) < 0 or counts[0] > LONGEST_WAIT:
            raise ValueError(f"guard counts {names} are {counts}; allowed: 0 or more, a wait up to {LONGEST_WAIT}")
        return cls(sums, bool(arrays["speculating"]), bool(arrays["trial"]), *counts)


class Guard:
    """Decides step by step whether wanted drafts are made; fed with what every step took."""

    def __init__(self, seed: int = 0) -> None:
        self.speculating = True
        self.num_switched_off = self.num_retries = self.num_held_out = 0
        self._rng = np.random.default_rng(seed)
        self._wait, self._waited = FIRST_WAIT, 0
        self._trial = False
        self._clear()

    def _clear(self) -> None:
        # Blocks, and sums over them of a, b, a a, a b, b b: a without drafts, b with them.
        self._sums = np.zeros(NUM_SUMS)
        self._begin_block()

    def _begin_block(self) -> None:
        size = TRIAL_BLOCK if self._trial else LONG_BLOCK if self.gain().low > 0.0 else BLOCK
        self._left, self._chosen = size, int(self._rng.integers(size))
        self._seconds = self._progress = self._plain = 0.0
        self._steps = 0

    def allows(self) -> bool:
        """Whether the coming step, in which drafting is wanted, may draft."""
        if not self.speculating:
            self._waited += 1
            if self._waited >= self._wait:
                self._retry()
        return self.speculating and self._left - 1 != self._chosen

    def observe(self, seconds: float, progress: float) -> None:
        """The step that `allows` was asked about: its wall seconds, and its progress (1 for a step held out).

        A step whose time is not finite and positive ends nothing and counts nothing.
        """
        if not self.speculating or not (np.isfinite(seconds) and seconds > 0.0 and np.isfinite(progress)):
            return
        if self._left - 1 == self._chosen:
            self._plain = seconds
            self.num_held_out += 1
        else:
            self._seconds += seconds
            self._progress += progress
            self._steps += 1
        self._left -= 1
        if self._left == 0:
            self._end_block()

    def _end_block(self) -> None:
        without, with_drafts = self._plain * self._progress / self._steps, self._seconds / self._steps
        self._sums *= FADE_PER_BLOCK
        self._sums += [1.0, without, with_drafts, without**2, without * with_drafts, with_drafts**2]
        gain = self.gain()
        if gain.high < 0.0:
            self._switch_off(gain)
        elif gain.low > 0.0 and self._trial:
            self._trial, self._wait = False, FIRST_WAIT
        self._begin_block()

    def gain(self) -> Gain:
        """What was measured since speculation last came on."""
        blocks, a, b, aa, ab, bb = self._sums
        if blocks < MIN_BLOCKS * 0.9 or a <= 0.0:
            return Gain(np.nan, np.nan, np.nan, blocks)
        ratio = b / a
        spread = max(bb - 2 * ratio * ab + ratio**2 * aa, 0.0) / (blocks - 1.0)
        error = Z * float(np.sqrt(spread * blocks)) / a
        return Gain(1.0 - ratio, 1.0 - ratio - error, 1.0 - ratio + error, blocks)

    def _switch_off(self, gain: Gain) -> None:
        self.speculating, self._waited = False, 0
        self.num_switched_off += 1
        if self._trial:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        _log.warning(
            "speculation costs more than it saves (gain %.1f %%, 95 %% interval %.1f to %.1f): off for %d steps",
            100 * gain.value,
            100 * gain.low,
            100 * gain.high,
            self._wait,
        )

    def _retry(self) -> None:
        self.speculating, self._trial = True, True
        self.num_retries += 1
        self._clear()
        _log.warning("speculation is tried again after %d steps without", self._waited)

    def state(self) -> GuardState:
        """All but the block that is open."""
        counts = self._wait, self._waited, self.num_switched_off, self.num_retries, self.num_held_out
        return GuardState(tuple(self._sums.tolist()), self.speculating, self._trial, *counts)

    def restore(self, state: GuardState) -> None:
        """Goes on from there with a new block: speculation that was off stays off until its trial is due."""
        self._sums = np.array(state.sums)
        self.speculating, self._trial = state.speculating, state.trial
        self._wait, self._waited = state.wait, state.waited
        self.num_switched_off, self.num_retries = state.switched_off, state.retries
        self.num_held_out = state.held_out
        self._begin_block()

    def metrics(self) -> dict[str, float]:
        """das/guard_*: whether speculation is on, how often it went off and came back, and the gain while it is on."""
        gain = self.gain()
        out = {
            "das/guard_speculating": float(self.speculating),
            "das/guard_switched_off": float(self.num_switched_off),
            "das/guard_retries": float(self.num_retries),
            "das/guard_held_out_steps": float(self.num_held_out),
        }
        if np.isfinite(gain.value):
            out |= {"das/guard_gain": gain.value, "das/guard_gain_low": gain.low, "das/guard_gain_high": gain.high}
        return out

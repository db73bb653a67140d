"""How long responses will be: learned from finished rollouts, sharpened while a response grows.

Invariants
- Plain counts on a fixed geometric grid of lengths: no state but finished rollouts, the same everywhere.
- A response cut at its length limit is censored: it was at risk up to there and says nothing beyond (Kaplan-Meier).
- A prompt's own hazard leans on that of its class, the class on all rollouts, all on PRIOR_HAZARD, each with the weight
  of SHRINKAGE responses: an unknown prompt has its elders' distribution, a well-known one its own.
- Everything is defined with nothing observed, with equal lengths and with all at the limit: numbers, never an error.

Sources: the classes and P(class | partial length, initial class) are section 4.2.3 of DAS (arXiv 2511.13841), which
publishes no thresholds and no estimator. Quantiles of recent lengths as thresholds, the discrete hazards, the nested
shrinkage and the censoring are ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

GROWTH = 1.125
"""A bin of the grid reaches this much further than the one before: lengths are known to about 6 %."""
NUM_BINS = 112
"""Bin b holds lengths GROWTH**b to GROWTH**(b + 1) tokens; the last one ends beyond 500,000."""
SHORT, MEDIUM, LONG, UNKNOWN = range(4)
CLASS_NAMES = ("short", "medium", "long")
QUANTILES = (1 / 3, 2 / 3)
HISTORY_PER_PROMPT, NUM_RECENT = 64, 8192
SHRINKAGE = 4.0
PRIOR_HAZARD = 0.05
PER_BIN = 1.0 / float(np.log(GROWTH))
"""Bins per unit of the log of a length."""


def bin_of(lengths: np.ndarray) -> np.ndarray:
    """[n] int64 bins of [n] lengths in tokens; lengths below 1 count as 1."""
    # The tiny shift keeps exact edges in the bin that they begin.
    place = np.log(np.maximum(lengths, 1.0)) * PER_BIN + 1e-9
    return np.minimum(place.astype(np.int64), NUM_BINS - 1)


def hazards(lengths: np.ndarray, censored: np.ndarray, prior: np.ndarray, weight: float = SHRINKAGE) -> np.ndarray:
    """[NUM_BINS] float64, the probability that a response which reaches a bin ends in it.

    lengths: [n] tokens; censored: [n] bool, cut at a limit. Kaplan-Meier on the grid, pulled towards `prior`
    ([NUM_BINS]) with `weight` pseudo-responses. A bin in which a response was cut counts as survived by it.
    """
    place = bin_of(np.asarray(lengths, np.float64))
    censored = np.asarray(censored, bool)
    ended = np.bincount(place[~censored], minlength=NUM_BINS)
    left = np.bincount(place, minlength=NUM_BINS)
    at_risk = left[::-1].cumsum()[::-1]
    return (ended + weight * prior) / (at_risk + weight)


def cumulative(hazard: np.ndarray) -> np.ndarray:
    """[NUM_BINS + 1] float32, minus the log of the probability of reaching each edge of the grid."""
    out = np.zeros(NUM_BINS + 1, np.float32)
    np.cumsum(-np.log1p(-np.clip(hazard, 0.0, 0.999)), out=out[1:])
    return out


class LengthModel:
    """Finished response lengths by prompt and pooled; see the module for what is estimated.

    thresholds: (t1, t2) tokens; short is below t1, long from t2 on.
    """

    def __init__(self) -> None:
        # A length as it was, negative where it was cut at a limit.
        self._history: dict[str, deque[int]] = {}
        self._recent: deque[tuple[int, int]] = deque(maxlen=NUM_RECENT)
        self._refresh()

    def observe(self, prompt_ids: Sequence[str], lengths: Sequence[int], censored: Sequence[bool]) -> None:
        """Takes in finished rollouts: [n] prompts, response tokens, and whether the length limit cut them.

        Rollouts without a token are left out.
        """
        # The class that was predicted for all of them, before any of them was known.
        initial = {prompt_id: self.initial_class(prompt_id) for prompt_id in set(prompt_ids)}
        for prompt_id, length, cut in zip(prompt_ids, lengths, censored, strict=True):
            if length < 1:
                continue
            signed = -int(length) if cut else int(length)
            self._history.setdefault(prompt_id, deque(maxlen=HISTORY_PER_PROMPT)).append(signed)
            self._recent.append((initial[prompt_id], signed))
        self._refresh()

    def _refresh(self) -> None:
        self._of_prompt: dict[str, np.ndarray] = {}
        initial, signed = np.array(self._recent, np.int64).reshape(-1, 2).T
        lengths, cut = np.abs(signed), signed < 0
        low, high = np.quantile(lengths, QUANTILES) if len(lengths) else (1.0, np.inf)
        self.thresholds = float(low), float(max(high, np.nextafter(low, np.inf)))
        everything = hazards(lengths, cut, np.full(NUM_BINS, PRIOR_HAZARD))
        self._by_initial = np.stack(
            [hazards(lengths[initial == c], cut[initial == c], everything) for c in range(UNKNOWN + 1)]
        )
        self._class_tables = np.stack([cumulative(row) for row in self._by_initial])

    def initial_class(self, prompt_id: str) -> int:
        """SHORT, MEDIUM or LONG by majority of the prompt's history (the longer one wins a tie), or UNKNOWN."""
        history = self._history.get(prompt_id)
        if not history:
            return UNKNOWN
        counts = np.bincount(self.final_class(np.abs(np.array(history))), minlength=3)
        return LONG - int(counts[::-1].argmax())

    def final_class(self, lengths: np.ndarray) -> np.ndarray:
        """[n] int64 classes of finished lengths."""
        low, high = self.thresholds
        return (lengths >= low).astype(np.int64) + (lengths >= high)

    def class_probabilities(self, initial: np.ndarray, generated: np.ndarray) -> np.ndarray:
        """[n, 3] P(final class | initial class, at least `generated` tokens), from the pooled counts.

        initial: [n] classes, UNKNOWN allowed; generated: [n] tokens so far.
        """
        edges = np.array([1.0, *self.thresholds])
        now = _at(self._class_tables, initial, np.maximum(generated, 1.0))
        reached = np.ones((len(initial), 4))
        reached[:, 3] = 0.0
        for column in (1, 2):
            edge = np.maximum(edges[column], np.maximum(generated, 1.0))
            finite = np.isfinite(edge)
            survived = np.exp(now - _at(self._class_tables, initial, np.where(finite, edge, 1.0)))
            reached[:, column] = np.where(finite, np.minimum(survived, 1.0), 0.0)
        # An edge that is passed already is reached for certain.
        return np.maximum(reached[:, :3] - reached[:, 1:], 0.0)

    def table(self, prompt_id: str) -> np.ndarray:
        """[NUM_BINS + 1] float32, the prompt's `cumulative` hazard; read-only, kept until the next `observe`."""
        found = self._of_prompt.get(prompt_id)
        if found is None:
            prior = self._by_initial[self.initial_class(prompt_id)]
            signed = np.array(self._history.get(prompt_id, ()), np.int64)
            found = cumulative(hazards(np.abs(signed), signed < 0, prior))
            self._of_prompt[prompt_id] = found
        return found

    def num_observed(self, prompt_id: str) -> int:
        """Responses of this prompt that are remembered."""
        return len(self._history.get(prompt_id, ()))

    def to_arrays(self) -> dict[str, list[object]]:
        """Everything as lists, for JSON."""
        return {
            "prompts": list(self._history),
            "history": [list(values) for values in self._history.values()],
            "recent": [list(pair) for pair in self._recent],
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, list[object]]) -> LengthModel:
        """The model of `to_arrays`. Raises ValueError for what it cannot have written."""
        model = cls()
        prompts, history = arrays["prompts"], arrays["history"]
        if len(prompts) != len(history):
            raise ValueError(f"lengths: {len(prompts)} prompts and {len(history)} histories; allowed: as many")
        for prompt_id, values in zip(prompts, history, strict=True):
            model._history[str(prompt_id)] = deque(_signed(values), maxlen=HISTORY_PER_PROMPT)
        for pair in arrays["recent"]:
            initial, signed = _signed(pair, zero=True)
            if not 0 <= initial <= UNKNOWN or signed == 0:
                raise ValueError(f"lengths: recent holds {pair}; allowed: a class from 0 to {UNKNOWN} and a length")
            model._recent.append((initial, signed))
        model._refresh()
        return model


class LiveLengths:
    """The lengths of the live batch: what a budget policy is shown of a LengthModel.

    tables: [slots, NUM_BINS + 1] float32 `LengthModel.table`s; rows: [B] the live requests' rows of it. initial: [B]
    classes. speed, width: [B] tokens that each request gains and draft tokens that it verifies per round. num_queued:
    requests that wait for a slot. owner: [B] non-decreasing worker index, for batches of several workers (replay);
    None: one worker. measured: speed is float32 and at least 1, width at least 0, as price_rows.round_rates gives them.
    """

    def __init__(
        self,
        model: LengthModel,
        tables: np.ndarray,
        rows: np.ndarray,
        initial: np.ndarray,
        speed: np.ndarray | None = None,
        num_queued: np.ndarray | float = 0.0,
        owner: np.ndarray | None = None,
        width: np.ndarray | None = None,
        measured: bool = False,
    ) -> None:
        self.model, self.tables, self.rows, self.initial = model, tables, rows, initial
        if speed is None:
            speed = np.ones(len(rows), np.float32)
        elif not measured:
            speed = np.maximum(np.where(np.isfinite(speed), speed, 1.0), 1.0).astype(np.float32)
        if width is None:
            width = np.zeros(len(rows))
        elif not measured:
            width = np.maximum(np.where(np.isfinite(width), width, 0.0), 0.0)
        self.speed, self.width = speed, width
        self.num_queued, self.owner = num_queued, owner

    @classmethod
    def of_prompts(cls, model: LengthModel, prompt_ids: Sequence[str]) -> LiveLengths:
        """A view of requests of these prompts."""
        tables = np.stack([model.table(name) for name in prompt_ids] or [np.zeros(NUM_BINS + 1, np.float32)])
        initial = np.array([model.initial_class(name) for name in prompt_ids], np.int64)
        return cls(model, tables, np.arange(len(prompt_ids)), initial)

    def num_live(self) -> np.ndarray | int:
        """Live requests of the worker, or [B] of each request's worker."""
        if self.owner is None:
            return len(self.rows)
        starts = np.flatnonzero(np.diff(self.owner, prepend=-1))
        sizes = np.diff(starts, append=len(self.owner))
        return np.repeat(sizes, sizes)

    def classes(self, generated: np.ndarray) -> np.ndarray:
        """[B] the most probable final class given the tokens so far; the longer one wins a tie. UNKNOWN without any
        history at all."""
        if not self.model._recent:
            return np.full(len(self.rows), UNKNOWN)
        probabilities = self.model.class_probabilities(self.initial, generated)
        return LONG - probabilities[:, ::-1].argmax(axis=1)

    def expected_remaining(self, generated: np.ndarray, remaining: np.ndarray) -> np.ndarray:
        """[B] expected tokens still to come, at most `remaining` ([B], what the limit leaves), at least 1."""
        points = np.concatenate([[0.0], np.geomspace(1 / 256, 1.0, 24)])
        ahead = np.maximum(remaining, 1)[:, None] * points
        survival = 1.0 - self.finished_within(generated, remaining, ahead)
        survival[:, -1] = survival[:, -2]
        mean = (np.diff(ahead, axis=1) * (survival[:, 1:] + survival[:, :-1])).sum(axis=1) / 2
        return np.clip(mean, 1.0, np.maximum(remaining, 1))

    def finished_within(
        self, generated: np.ndarray, remaining: np.ndarray, ahead: np.ndarray, part: slice = slice(None)
    ) -> np.ndarray:
        """[B, G] float32, P(response ends within `ahead` ([B, G]) more tokens); 1 from `remaining` ([B]) on.

        part: the rows that the arguments are about.
        """
        rows = self.rows[part, None]
        so_far = np.maximum(generated, 1).astype(np.float32)[:, None]
        now = _at(self.tables, rows, so_far)
        ended = 1.0 - np.exp(now - _at(self.tables, rows, so_far + ahead.astype(np.float32, copy=False)))
        ended[ahead >= remaining[:, None]] = 1.0
        return ended


def _at(tables: np.ndarray, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Cumulative hazard of `rows` at `tokens` (>= 1), linear in the log of the length between edges."""
    # float32 throughout: numpy's vector units do it faster, and lengths are not known to seven digits.
    place = np.log(tokens.astype(np.float32, copy=False))
    place *= np.float32(PER_BIN)
    below = np.minimum(place, np.float32(NUM_BINS - 1)).astype(np.int32)
    place -= below.astype(np.float32)
    flat = below + (rows * (NUM_BINS + 1)).astype(np.int32)
    values = tables.ravel()
    low, high = values.take(flat), values[1:].take(flat)
    high -= low
    high *= place
    high += low
    return high


def _signed(values: object, zero: bool = False) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(v, int) and (zero or v != 0) for v in values):
        raise ValueError(f"lengths: {str(values)[:60]} is no list of lengths; allowed: whole numbers other than 0")
    return values

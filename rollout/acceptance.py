"""How often draft tokens are accepted, measured: turns what a drafter counts into probabilities.

Invariants
- A token is observed if all before it on its path were accepted: accepted is 1, rejected is 0, what comes after a
  rejected one says nothing. Tokens after the end of a response say nothing either.
- A rare cell leans on its neighbours: its estimate is pulled, with the weight of `prior_weight` tokens, towards PRIOR
  times what all match lengths of its source and share show beyond PRIOR (nested shrinkage; ours).
- Plain sums: models of several workers are added, and what is older fades by a factor per training step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slipstream.drafter.base import DraftBatch, Ragged
from slipstream.drafter.calibration import CELL_SHAPE, NUM_CELLS, NUM_WEIGHT_BUCKETS, SOURCE_CLASSES
from slipstream.rollout.price_rows import invert_curve

NUM_CURVE_BUCKETS = 10
CURVE_PRIOR_TOKENS = 64.0
FADE_PER_STEP = 0.99
CALIBRATE_EVERY_STEPS = 32
KEPT_STEPS = 8
RELIABILITY_KEYS = tuple(f"{10 * i + 5:02d}" for i in range(NUM_CURVE_BUCKETS))


def calibrates_after(num_steps: int) -> bool:
    """Whether an engine hands on new probabilities after this many drafting steps: 1, 2, 4, ..., 32, then every 32."""
    return num_steps % CALIBRATE_EVERY_STEPS == 0 or num_steps & (num_steps - 1) == 0


def _prior() -> np.ndarray:
    match = np.array([0.8, 0.95, 1.0, 1.0, 1.0, 1.0, 1.05, 1.05])
    source = {"self": 0.7, "sibling": 0.95, "shared": 0.7}
    share = (np.arange(NUM_WEIGHT_BUCKETS) + 0.5) / NUM_WEIGHT_BUCKETS
    by_source = np.array([source.get(name, 1.0) for name in SOURCE_CLASSES])
    return np.minimum(by_source[:, None, None] * match[None, :, None] * share, 0.98)


PRIOR = _prior()
"""CELL_SHAPE float64, before anything is observed: the relative weight, less where a short match says it, or text that
is not the prompt's own history. Chosen between a few on the recorded job of the index bench, where first visits accept
the most with it."""


class AcceptanceModel:
    """Observed and accepted tokens by calibration cell, and the reliability curve of path probabilities.

    seen, accepted: [NUM_CELLS] float64. curve: [3, NUM_CURVE_BUCKETS] float64, for draft tokens whose estimated path
    probability falls into each tenth: how many, the sum of the estimates, and how many were accepted with their path.
    squared_error: summed (estimate - outcome)**2 of the same tokens.
    """

    def __init__(self, prior_weight: float = 8.0) -> None:
        if not prior_weight > 0.0:
            raise ValueError(f"prior_weight is {prior_weight}; allowed: above 0")
        self.prior_weight = prior_weight
        self.seen, self.accepted = np.zeros(NUM_CELLS), np.zeros(NUM_CELLS)
        self.curve = np.zeros((3, NUM_CURVE_BUCKETS))
        self.squared_error = 0.0

    def observe(
        self, cells: np.ndarray, probs: np.ndarray, drafted: np.ndarray, accepted: np.ndarray, ended: np.ndarray
    ) -> None:
        """Takes in one verified step of chains.

        cells, probs: [rows, width] as in DraftBatch; drafted, accepted: [rows], tokens verified and kept; ended: [rows]
        bool, the response ended in this step, so that no draft token was rejected. Tokens with cell -1 are left out of
        the cells, tokens with a NaN estimate out of the curve.
        """
        width = int(drafted.max(initial=0))
        if width == 0:
            return
        column = np.arange(width)
        kept = column < accepted[:, None]
        reached = column < np.where(ended, accepted, np.minimum(drafted, accepted + 1))[:, None]
        self._observe(cells[:, :width], probs[:, :width], drafted, ended, kept, reached)

    def observe_trees(
        self,
        cells: np.ndarray,
        probs: np.ndarray,
        drafted: np.ndarray,
        ended: np.ndarray,
        parents: np.ndarray,
        kept: np.ndarray,
    ) -> None:
        """Takes in one verified step of trees: as `observe`, with the parents of DraftBatch and the tokens kept, [rows,
        width] bool."""
        width = int(drafted.max(initial=0))
        reached = np.take_along_axis(np.pad(kept, ((0, 0), (1, 0)), constant_values=True), parents + 1, axis=1)
        reached &= (np.arange(kept.shape[1]) < drafted[:, None]) & (~ended[:, None] | kept)
        part = np.s_[:, :width]
        self._observe(cells[part], probs[part], drafted, ended, kept[part], reached[part])

    def _observe(
        self,
        cells: np.ndarray,
        probs: np.ndarray,
        drafted: np.ndarray,
        ended: np.ndarray,
        kept: np.ndarray,
        reached: np.ndarray,
    ) -> None:
        known = reached & (cells >= 0)
        self.seen += np.bincount(cells[known], minlength=NUM_CELLS)
        self.accepted += np.bincount(cells[known & kept], minlength=NUM_CELLS)
        self._observe_curve(probs, kept, (np.arange(kept.shape[1]) < drafted[:, None]) & (~ended[:, None] | kept))

    def _observe_curve(self, probs: np.ndarray, kept: np.ndarray, judged: np.ndarray) -> None:
        judged = judged & ~np.isnan(probs)
        estimate, outcome = probs[judged].astype(np.float64), kept[judged].astype(np.float64)
        estimate = np.clip(estimate, 0.0, 1.0)
        bucket = np.minimum((estimate * NUM_CURVE_BUCKETS).astype(np.int64), NUM_CURVE_BUCKETS - 1)
        for row, weights in enumerate((np.ones_like(estimate), estimate, outcome)):
            self.curve[row] += np.bincount(bucket, weights, NUM_CURVE_BUCKETS)
        self.squared_error += float(((estimate - outcome) ** 2).sum())

    def probabilities(self) -> np.ndarray:
        """[NUM_CELLS] float32: the probability that a token of each cell is accepted, given that its path was."""
        seen, accepted = self.seen.reshape(CELL_SHAPE), self.accepted.reshape(CELL_SHAPE)
        k = self.prior_weight
        beyond = (accepted.sum(axis=1) + k) / ((seen * PRIOR).sum(axis=1) + k)
        leaning = np.minimum(PRIOR * beyond[:, None], 0.98)
        return ((accepted + k * leaning) / (seen + k)).ravel().astype(np.float32)

    def estimates_for(self, probabilities: np.ndarray) -> np.ndarray:
        """[n] float32, the estimates at which draft tokens are really accepted, path and all, with these probabilities.

        Inverts the reliability curve: linear between its points, each pulled to the diagonal with the weight of
        CURVE_PRIOR_TOKENS, made non-decreasing. Products of many calibrated factors are not calibrated: what a path of
        doubtful tokens has in common makes its estimate too high.
        """
        return invert_curve(self.curve, probabilities, CURVE_PRIOR_TOKENS)

    def add(self, other: AcceptanceModel) -> None:
        """Adds what another model observed."""
        self.seen += other.seen
        self.accepted += other.accepted
        self.curve += other.curve
        self.squared_error += other.squared_error

    def minus(self, earlier: AcceptanceModel) -> AcceptanceModel:
        """What was observed since `earlier`, a copy of this model as it was."""
        out = AcceptanceModel(self.prior_weight)
        out.seen, out.accepted = self.seen - earlier.seen, self.accepted - earlier.accepted
        out.curve = self.curve - earlier.curve
        out.squared_error = self.squared_error - earlier.squared_error
        return out

    def copy(self) -> AcceptanceModel:
        """An independent copy."""
        out = AcceptanceModel(self.prior_weight)
        out.add(self)
        return out

    def fade(self, factor: float = FADE_PER_STEP) -> None:
        """Step boundary: what was observed under older policies counts less."""
        self.seen *= factor
        self.accepted *= factor
        self.curve *= factor
        self.squared_error *= factor

    def metrics(self) -> dict[str, float]:
        """What the curve says, under drafter/; empty when nothing was drafted.

        calibration_error: |estimate - accepted share|, averaged over the tokens; brier: mean squared error of the
        estimates; reliability/35: share accepted of the tokens estimated at 0.3 to 0.4, and reliability_tokens/35 how
        many they are, for every tenth that has any.
        """
        count, estimate, accepted = self.curve
        total = count.sum()
        if total <= 0.0:
            return {}
        out = {
            "drafter/calibration_error": float(np.abs(estimate - accepted).sum() / total),
            "drafter/brier": self.squared_error / float(total),
        }
        for i in np.flatnonzero(count > 0.0):
            out[f"drafter/reliability/{RELIABILITY_KEYS[i]}"] = float(accepted[i] / count[i])
            out[f"drafter/reliability_tokens/{RELIABILITY_KEYS[i]}"] = float(count[i])
        return out

    def reliability(self) -> list[dict[str, float]]:
        """The curve as rows: mean estimate, share accepted and number of tokens of every tenth that has any."""
        rows = zip(*self.curve.tolist(), strict=True)
        return [{"estimate": p / n, "accepted": a / n, "tokens": n} for n, p, a in rows if n > 0.0]

    def to_arrays(self) -> dict[str, list[float]]:
        """Everything as lists of numbers, for JSON."""
        return {
            "seen": self.seen.tolist(),
            "accepted": self.accepted.tolist(),
            "curve": self.curve.ravel().tolist(),
            "squared_error": [self.squared_error],
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, list[float]]) -> AcceptanceModel:
        """The model of `to_arrays`. Raises ValueError for sizes of another version and for impossible counts."""
        model, error = cls(), np.zeros(1)
        parts = ("seen", model.seen), ("accepted", model.accepted), ("curve", model.curve), ("squared_error", error)
        for name, target in parts:
            values = np.asarray(arrays[name], np.float64)
            if values.size != target.size or not (np.isfinite(values) & (values >= 0.0)).all():
                raise ValueError(f"acceptance: {name} has {values.size} values; allowed: {target.size} of 0 or more")
            target[...] = values.reshape(target.shape)
        if (model.accepted > model.seen).any():
            raise ValueError("acceptance: a cell has more accepted tokens than seen; allowed: at most as many")
        model.squared_error = float(error[0])
        return model


class AcceptanceBuffer:
    """Keeps verified steps for a while: a model takes in many about as fast as one. model: as of the last flush."""

    def __init__(self, model: AcceptanceModel) -> None:
        self.model = model
        self._steps: list[tuple[np.ndarray, ...]] = []
        self._trees: list[tuple[np.ndarray, ...]] = []

    def observe(
        self,
        drafts: DraftBatch,
        rows: np.ndarray,
        drafted: np.ndarray,
        accepted: np.ndarray,
        ended: np.ndarray,
        path: Ragged | None = None,
    ) -> None:
        """See AcceptanceModel.observe; `rows` of the drafts, which may be overwritten afterwards. path: where there are
        trees, of every row the row of each new token (kernels.reference.Verified.path)."""
        if path is None:
            self._steps.append((drafts.cells[rows], drafts.probs[rows], drafted, accepted, ended))
        else:
            parents = drafts.parents[rows].astype(np.int64)
            kept = np.zeros(parents.shape, bool)
            row_of = np.repeat(np.arange(len(rows)), accepted)
            nth = np.arange(len(row_of)) - (np.cumsum(accepted) - accepted)[row_of]
            kept[row_of, path.values[path.offsets[row_of] + nth + 1] - 1] = True
            self._trees.append((drafts.cells[rows], drafts.probs[rows], drafted, ended, parents, kept))
        if len(self._steps) + len(self._trees) >= KEPT_STEPS:
            self.flush()

    def flush(self) -> AcceptanceModel:
        """The model with everything taken in."""
        if self._steps:
            self.model.observe(*(np.concatenate(parts) for parts in zip(*self._steps, strict=True)))
            self._steps.clear()
        if self._trees:
            self.model.observe_trees(*(np.concatenate(parts) for parts in zip(*self._trees, strict=True)))
            self._trees.clear()
        return self.model

"""What an engine step costs, fitted while the engine runs.

Invariants
- seconds = c_base + c_live * live requests + c_kv * KV tokens + c_tok * forward tokens, all coefficients at least 0
  (non-negative least squares): DAS's t_fwd = c_base + c_tok n_toks (Eq 1) with the price of a longer batch and of a
  longer context taken out of c_tok, which its profile mixes in.
- Plain weighted sums: models of several workers are added, and what is older fades by a factor per training step.
- A measurement that is not a positive finite time is left out and counted; one far off the fit counts little.
- What is not known well enough is not used: until `trusted`, prices come from the prior ratio `knee_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

NUM_FEATURES = 4
FADE_PER_STEP = 0.97
FIT_EVERY = 32
FIRST_FIT = 8
MIN_STEPS = 48
MAX_RELATIVE_ERROR = 0.1
OUTLIER = 3.0
MIN_TOKEN_SHARE = 1e-4
RIDGE = np.array([0.0, 0.02, 0.02, 0.0])
"""Pulls c_live and c_kv to 0 where steps do not tell them from c_tok: then a draft token is priced too high, not too
low. Relative to the sums on the diagonal."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step: base, and for each live request, KV token and forward token."""

    base: float
    live: float
    kv: float
    tok: float

    def seconds(
        self, live: np.ndarray | float, kv_tokens: np.ndarray | float, forward_tokens: np.ndarray | float
    ) -> np.ndarray | float:
        """Predicted seconds of steps."""
        return self.base + self.live * live + self.kv * kv_tokens + self.tok * forward_tokens

    @property
    def knee_tokens(self) -> float:
        """Tokens that cost as much as the pass itself; infinite where tokens are free."""
        return self.base / self.tok if self.tok > 0.0 else float("inf")


class CostModel:
    """The fit. knee_tokens: prior c_base / c_tok. buckets: ascending sizes that the engine rounds forward tokens up to
    (CUDA graphs); sizes beyond the last run as they are."""

    def __init__(self, knee_tokens: float = 32.0, buckets: Sequence[int] = ()) -> None:
        if not 0.0 < knee_tokens < float("inf"):
            raise ValueError(f"knee_tokens is {knee_tokens}; allowed: above 0, finite")
        self.knee_tokens = knee_tokens
        self._buckets = np.array(sorted(buckets), np.int64)
        self._products = np.zeros((NUM_FEATURES, NUM_FEATURES))
        self._targets = np.zeros(NUM_FEATURES)
        # Weights, weighted squared seconds, squared relative errors and their weights, steps, steps left out.
        self._totals = np.zeros(6)
        # Steps not in the sums yet: many are taken in about as fast as one.
        self._waiting: list[tuple[float, float, float, float]] = []
        self._spread = 0.0
        self._fit: StepCost | None = None
        self._trusted = False

    # ---- observing

    @property
    def products(self) -> np.ndarray:
        """[4, 4] weighted products of the features of all steps."""
        self._take_in()
        return self._products

    @property
    def targets(self) -> np.ndarray:
        """[4] weighted products of features and seconds."""
        self._take_in()
        return self._targets

    @property
    def totals(self) -> np.ndarray:
        """[6] weights, weighted squared seconds, squared relative errors, their weights, steps, steps left out."""
        self._take_in()
        return self._totals

    def observe(self, live: int, kv_tokens: int, forward_tokens: int, seconds: float) -> None:
        """Takes in one step: live requests, cached tokens that they attend to, packed tokens, wall seconds."""
        if not 0.0 < seconds < float("inf") or live < 1 or forward_tokens < 1:
            self._totals[5] += 1.0
            return
        self._waiting.append((live, kv_tokens, self.rounded(forward_tokens), seconds))
        if len(self._waiting) >= (FIT_EVERY if self._fit is not None else FIRST_FIT):
            self.fit()

    def _take_in(self) -> None:
        if not self._waiting:
            return
        steps = np.array(self._waiting, np.float64)
        self._waiting.clear()
        seconds = steps[:, 3]
        x = np.column_stack([np.ones(len(steps)), steps[:, :3]])
        expected, weight = seconds, np.ones(len(steps))
        if self._fit is not None:
            expected = np.maximum(self._fit.seconds(x[:, 1], x[:, 2], x[:, 3]), 1e-9)
            error = np.abs(seconds - expected) / expected
            # Huber: beyond OUTLIER spreads a step pulls with constant force, so one hiccup moves nothing.
            weight = np.minimum(1.0, OUTLIER * max(self._spread, 0.02) / np.maximum(error, 1e-9))
            self._totals[2] += (np.minimum(error, 1.0) ** 2).sum()
            self._totals[3] += len(steps)
        # Errors are relative: a fifth of a short step matters as much as a fifth of a long one.
        weight = weight / expected**2
        self._products += (x * weight[:, None]).T @ x
        self._targets += (weight * seconds) @ x
        self._totals[0] += weight.sum()
        self._totals[1] += (weight * seconds**2).sum()
        self._totals[4] += len(steps)

    def rounded(self, forward_tokens: int) -> int:
        """Forward tokens as the engine runs them."""
        if not len(self._buckets):
            return forward_tokens
        place = int(np.searchsorted(self._buckets, forward_tokens))
        return int(self._buckets[place]) if place < len(self._buckets) else forward_tokens

    # ---- the fit

    def fit(self) -> None:
        """Solves for the coefficients with everything observed so far."""
        if self.totals[4] < FIRST_FIT:
            return
        values = nonnegative_least_squares(self.products, self.targets)
        if values is None:
            return
        self._fit = StepCost(*values.tolist())
        seen = max(self.totals[3], 1.0)
        self._spread = float(np.sqrt(self.totals[2] / seen)) if self.totals[3] >= 8 else 0.25
        self._trusted = self._well_known(values)

    def _well_known(self, values: np.ndarray) -> bool:
        steps = self.totals[4]
        if steps < MIN_STEPS or values[0] + values[3] <= 0.0:
            return False
        left = self.totals[1] - 2 * values @ self.targets + values @ self.products @ values
        variance = max(float(left), 0.0) / max(steps - NUM_FEATURES, 1.0)
        try:
            inverse = np.linalg.inv(self.products + np.diag(_ridge(self.products)))
        except np.linalg.LinAlgError:
            return False
        mean_tokens = self.products[0, 3] / self.totals[0]
        mean_seconds = self.targets[0] / self.totals[0]
        error = np.sqrt(max(variance * float(inverse[3, 3]), 0.0)) * mean_tokens
        return bool(error <= MAX_RELATIVE_ERROR * mean_seconds)

    @property
    def trusted(self) -> bool:
        """Whether MIN_STEPS steps were seen and the standard error of c_tok, for a step of mean size, is at most
        MAX_RELATIVE_ERROR of its seconds."""
        return self._trusted and self._fit is not None

    @property
    def cost(self) -> StepCost:
        """The fitted coefficients when trusted; before that only their ratio is meant: knee_tokens to 1.

        tok is at least MIN_TOKEN_SHARE of base, so that no fit makes tokens free.
        """
        if self._fit is None or not self.trusted:
            return StepCost(self.knee_tokens, 0.0, 0.0, 1.0)
        fit = self._fit
        return StepCost(fit.base, fit.live, fit.kv, max(fit.tok, MIN_TOKEN_SHARE * (fit.base + fit.live), 1e-12))

    def metrics(self) -> dict[str, float]:
        """das/cost_* in seconds, and whether they are in use; the relative error is the root mean square of what was
        measured against what was predicted just before."""
        out = {"das/cost_trusted": float(self.trusted), "das/cost_steps": float(self.totals[4])}
        if self._fit is not None:
            for name in ("base", "live", "kv", "tok"):
                out[f"das/cost_{name}_s"] = float(getattr(self._fit, name))
            out["das/cost_relative_error"] = self._spread
        return out

    # ---- sums

    def copy(self) -> CostModel:
        """An independent copy."""
        out = CostModel(self.knee_tokens, self._buckets.tolist())
        out.add(self)
        return out

    def replace(self, other: CostModel) -> None:
        """Goes on from what `other` observed, with the prior and the buckets of this model."""
        for mine in (self.products, self.targets, self.totals):
            mine[...] = 0.0
        self.add(other)

    def add(self, other: CostModel) -> None:
        """Adds what another model observed."""
        mine, theirs = (self.products, self.targets, self.totals), (other.products, other.targets, other.totals)
        for sums, others in zip(mine, theirs, strict=True):
            sums += others
        self.fit()

    def minus(self, earlier: CostModel) -> CostModel:
        """What was observed since `earlier`, a copy of this model as it was."""
        out = CostModel(self.knee_tokens, self._buckets.tolist())
        out._products, out._targets = self.products - earlier.products, self.targets - earlier.targets
        out._totals = np.maximum(self.totals - earlier.totals, 0.0)
        return out

    def fade(self, factor: float = FADE_PER_STEP) -> None:
        """Step boundary: older steps count less."""
        for sums in (self.products, self.targets, self.totals):
            sums *= factor

    def to_arrays(self) -> dict[str, list[float]]:
        """Everything as lists of numbers, for JSON."""
        parts = self.products.ravel(), self.targets, self.totals
        return {name: part.tolist() for name, part in zip(("products", "targets", "totals"), parts, strict=True)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, list[float]], knee_tokens: float = 32.0) -> CostModel:
        """The model of `to_arrays`. Raises ValueError for other sizes and for numbers that no sums can be."""
        model = cls(knee_tokens)
        for name, target in (("products", model.products), ("targets", model.targets), ("totals", model.totals)):
            values = np.asarray(arrays[name], np.float64)
            if values.size != target.size or not (np.isfinite(values) & (values >= 0.0)).all():
                raise ValueError(f"cost: {name} has {values.size} values; allowed: {target.size} of 0 or more")
            target[...] = values.reshape(target.shape)
        model.fit()
        return model


def _ridge(products: np.ndarray) -> np.ndarray:
    diagonal = np.diag(products)
    return RIDGE * diagonal + 1e-9 * diagonal + np.where(diagonal > 0.0, 0.0, 1.0)


def nonnegative_least_squares(products: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
    """argmin over x >= 0 of x'Ax - 2x'b + ridge, A = `products` [k, k], b = `targets` [k]; None if nothing is finite.

    Supports are tried, the largest first, until one meets the conditions of an optimum (what is left out would rather
    be negative), else all of them, which is exact: 2^4 systems of at most 4 unknowns.
    """
    size = len(targets)
    matrix = products + np.diag(_ridge(products))
    best, least = None, 0.0
    for count in range(size, 0, -1):
        for support in map(list, combinations(range(size), count)):
            try:
                found = np.linalg.solve(matrix[np.ix_(support, support)], targets[support])
            except np.linalg.LinAlgError:
                continue
            if not (np.isfinite(found).all() and (found >= 0.0).all()):
                continue
            value = -float(found @ targets[support])
            if value < least:
                best, least = np.zeros(size), value
                best[support] = found
                left_out = [i for i in range(size) if i not in support]
                if (matrix[left_out] @ best >= targets[left_out]).all():
                    return best
    return best

"""DAS's closed-form optimum: one number of rounds for all, and the drafts that each request needs to keep to it.

The programme (arXiv 2511.13841, Eq 4-6): min over p >= 0 and N of c_base N + c_tok sum_i p_i, subject to
rounds_i(p_i) = l_i (1 - k_i + k_i exp(-alpha_i p_i / l_i)) <= N (acceptance model Eq 3). As printed, Eq 7-9 multiply by
k where the inversion of the constraint divides by it; `corrected` is Eq 7' and 9', `published` is as printed.

Invariants: both forms return finite p >= 0 and N >= 0 for any input; N never exceeds the longest request; with k = 1
the two forms agree. Not published, ours: alpha = 1 and k = the share of accepted draft tokens (the limits of a chain
whose tokens are accepted with one probability a: accepted/l tends to a for long drafts, and the first token of a round
is accepted with a), and the budget of a round, gamma_i = p_i / N rounded to the nearest whole token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from slipstream.drafter.base import LiveBatch, Price
from slipstream.rollout.budget import ChainRate, chain_price
from slipstream.rollout.cost_model import CostModel, StepCost
from slipstream.rollout.lengths import LiveLengths

Formula = Literal["published", "corrected"]
NUM_BISECTIONS = 48
_FAR = 1e9


def rounds(length: np.ndarray, alpha: np.ndarray, k: np.ndarray, drafts: np.ndarray) -> np.ndarray:
    """[n] forward rounds of requests of `length` tokens that verify `drafts` draft tokens in all (Eq 5)."""
    return length * (1.0 - k + k * np.exp(-alpha * drafts / length))


def drafts_for(
    target: float, length: np.ndarray, alpha: np.ndarray, k: np.ndarray, formula: Formula = "corrected"
) -> np.ndarray:
    """[n] p_i*: draft tokens with which each request takes `target` rounds; 0 where it takes no more anyway.

    corrected: Eq 7', p = -(l/alpha) ln(1 - (1 - N/l)/k), infinite where N is out of reach; published: Eq 7 as printed,
    p = -(l/alpha) ln(1 - k (1 - N/l)).
    """
    short = np.maximum(1.0 - target / length, 0.0)
    inside = 1.0 - short / k if formula == "corrected" else 1.0 - short * k
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(inside > 0.0, -(length / alpha) * np.log(np.maximum(inside, 1e-300)), np.inf)


def solve(
    cost: StepCost, length: np.ndarray, alpha: np.ndarray, k: np.ndarray, formula: Formula = "corrected"
) -> float:
    """N*, where the derivative of J(N) changes sign, by bisection.

    corrected: Eq 9', c_base = c_tok sum_{l > N} 1 / (alpha (N/l - (1 - k))), whose right side falls with N. published:
    Eq 9, c_base = c_tok sum_{l > N} k / (alpha (1 - k + k N/l)). The root of k = 1 is Eq 9 with either form.
    """
    longest = float(length.max())
    floor = float((length * (1.0 - k)).max()) if formula == "corrected" else 0.0
    if not (cost.base > 0.0 and np.isfinite(cost.base)):
        return longest
    if not cost.tok > 0.0:
        return min(floor + 1e-6 * longest, longest)
    low, high = floor, longest
    for _ in range(NUM_BISECTIONS):
        middle = 0.5 * (low + high)
        if cost.tok * _slope(middle, length, alpha, k, formula) > cost.base:
            low = middle
        else:
            high = middle
    return high


def _slope(target: float, length: np.ndarray, alpha: np.ndarray, k: np.ndarray, formula: Formula) -> float:
    """-d(sum of p)/dN at N = target."""
    longer = length > target
    part = target / length[longer]
    if formula == "corrected":
        gap = part - (1.0 - k[longer])
        return float((1.0 / (alpha[longer] * np.maximum(gap, 1e-12))).sum())
    return float((k[longer] / (alpha[longer] * np.maximum(1.0 - k[longer] + k[longer] * part, 1e-12))).sum())


def total_cost(cost: StepCost, length: np.ndarray, alpha: np.ndarray, k: np.ndarray, drafts: np.ndarray) -> float:
    """J: c_base max_i rounds_i(p_i) + c_tok sum_i p_i, in the unit of the costs: what the drafts p really cost."""
    return cost.base * float(rounds(length, alpha, k, drafts).max()) + cost.tok * float(drafts.sum())


class ClosedFormBudget:
    """gamma_i = p_i* / N* for every live request, from expected remaining lengths.

    Lengths are those still to come. Without lengths all requests count as equally long, without a trusted cost
    c_base / c_tok is the model's knee_tokens. Solved anew every `refresh_every` steps and when the batch changes.
    """

    def __init__(
        self,
        max_draft_tokens: int,
        formula: Formula = "corrected",
        widths: Sequence[int] = (),
        refresh_every: int = 16,
    ) -> None:
        self.max_draft_tokens, self.formula, self.widths = max_draft_tokens, formula, tuple(widths)
        self.chain, self._refresh_every = ChainRate(), refresh_every
        self._uids, self._budget, self._age = np.zeros(0, np.int64), np.zeros(0), 0

    def price(self, live: LiveBatch, cost: CostModel | None = None, lengths: LiveLengths | None = None) -> Price:
        """The rounded gamma_i, at most max_draft_tokens; no least probability."""
        self._age += 1
        if self._age >= self._refresh_every or not np.array_equal(live.uids, self._uids):
            step = cost.cost if cost is not None else StepCost(32.0, 0.0, 0.0, 1.0)
            self._uids, self._age = live.uids, 0
            self._budget = self.budget(live, step, lengths, self.chain.rate)
        return chain_price(self._budget, self.widths)

    def budget(
        self, live: LiveBatch, step: StepCost, lengths: LiveLengths | None, rate: np.ndarray | float
    ) -> np.ndarray:
        """[B] draft tokens a round. rate: share of accepted draft tokens, of all or of each row."""
        if not len(live):
            return np.zeros(0)
        if lengths is None:
            left = np.maximum(live.num_remaining, 1).astype(np.float64)
        else:
            left = lengths.expected_remaining(live.num_generated, live.num_remaining).astype(np.float64)
        alpha, k = np.ones(len(left)), np.clip(np.broadcast_to(rate, len(left)), 1e-3, 0.999)
        target = max(solve(step, left, alpha, k, self.formula), 1e-9)
        wanted = np.minimum(drafts_for(target, left, alpha, k, self.formula), _FAR)
        return np.minimum(np.rint(wanted / target), self.max_draft_tokens)

    def observe(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Keeps the share of accepted tokens."""
        self.chain.observe(drafted, accepted)

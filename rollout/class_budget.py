"""DAS's three classes: aggressive, intermediate and no speculation for Long, Medium and Short requests.

Invariants: the class is that of section 4.2.3 (arXiv 2511.13841), recomputed from the partial length; budgets of Long
and Medium and the thresholds are not published: quantiles of recent lengths (rollout/lengths.py) and 24 and 8 are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slipstream.drafter.base import LiveBatch, Price
from slipstream.rollout.budget import chain_price
from slipstream.rollout.cost_model import CostModel
from slipstream.rollout.lengths import MEDIUM, UNKNOWN, LiveLengths


class ClassBudget:
    """budgets: draft tokens of Short, Medium and Long requests; what has no history counts as Medium."""

    def __init__(self, budgets: Sequence[int] = (0, 8, 24), widths: Sequence[int] = ()) -> None:
        self._budgets = np.array([*budgets, budgets[MEDIUM]], np.int32)
        self._widths = tuple(widths)

    def price(self, live: LiveBatch, cost: CostModel | None = None, lengths: LiveLengths | None = None) -> Price:
        """Its class's budget for every row (Class_r | l, Init_r = argmax_c P(c | l, Init_r))."""
        classes = np.full(len(live), UNKNOWN) if lengths is None else lengths.classes(live.num_generated)
        return chain_price(self._budgets[classes], self._widths)

    def observe(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Nothing to learn."""

"""Budget policies: how many draft tokens each live request may spend in a step.

Invariants: pure functions of numbers; a policy never raises in the decode loop; a price of 0 means no drafting.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from slipstream.drafter.base import LiveBatch, Price


class BudgetPolicy(Protocol):
    """Prices draft tokens for the live batch. `cost` and `lengths` are models fitted elsewhere, or None."""

    def price(self, live: LiveBatch, cost: Any = None, lengths: Any = None) -> Price:
        """The most draft tokens per row, and the least acceptance probability worth verifying."""


def _price(max_draft: np.ndarray) -> Price:
    return Price(max_draft=max_draft.astype(np.int32), min_accept_prob=np.zeros(len(max_draft), np.float32))


class OffBudget:
    """No drafting."""

    def price(self, live: LiveBatch, cost: Any = None, lengths: Any = None) -> Price:
        """Zero for every row."""
        return _price(np.zeros(len(live)))


class FixedBudget:
    """The same draft width for every request: the usual baseline."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens

    def price(self, live: LiveBatch, cost: Any = None, lengths: Any = None) -> Price:
        """num_draft_tokens for every row."""
        return _price(np.full(len(live), self.num_draft_tokens))


class TailBudget:
    """A fixed number of tokens per forward pass, shared by the live requests (our own choice).

    With B live requests each may draft (max_step_tokens - B) / B tokens: almost none while the batch is full and the
    pass is compute-bound, up to `max_draft_tokens` in the tail, where a pass costs the same for one token or thirty.
    """

    def __init__(self, max_step_tokens: int, max_draft_tokens: int) -> None:
        self.max_step_tokens, self.max_draft_tokens = max_step_tokens, max_draft_tokens

    def price(self, live: LiveBatch, cost: Any = None, lengths: Any = None) -> Price:
        """An equal share of the spare tokens for every row."""
        rows = len(live)
        share = max(0, self.max_step_tokens - rows) // rows if rows else 0
        return _price(np.full(rows, min(share, self.max_draft_tokens)))

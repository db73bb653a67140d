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
    """Draft token j of a request iff its probability of acceptance q_j is at least B / (B + knee_tokens).

    The price rule (lambda_i + c_tok) q_ij >= c_tok of the DAS programme's Lagrangian with lambda_i = c_base / B: every
    one of the B live requests is held to be equally likely to finish last. knee_tokens = c_base / c_tok, the number
    of tokens that cost as much as a pass itself. While the batch is full only safe tokens pass; in the tail almost
    everything does, because a pass costs the same for one token or thirty.
    """

    def __init__(self, knee_tokens: float, max_draft_tokens: int) -> None:
        self.knee_tokens, self.max_draft_tokens = knee_tokens, max_draft_tokens

    def price(self, live: LiveBatch, cost: Any = None, lengths: Any = None) -> Price:
        """The same threshold for every row."""
        rows = len(live)
        threshold = rows / (rows + self.knee_tokens)
        return Price(
            max_draft=np.full(rows, self.max_draft_tokens, np.int32),
            min_accept_prob=np.full(rows, threshold, np.float32),
        )

"""Budget policies: how many draft tokens each live request may spend in a step, and which are worth verifying.

Invariants
- A policy is a pure function of numbers it is given or has been shown before; it never raises in the decode loop and
  never changes a token.
- A max_draft of 0 means no drafting; it never exceeds what the engine can run (`widths`).
- With nothing known (no lengths, no trusted cost, no acceptance) every policy has a defined, documented price.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from slipstream.drafter.base import LiveBatch, Price
from slipstream.kernels.native import _native
from slipstream.rollout.cost_model import CostModel, StepCost
from slipstream.rollout.finish_last import finish_last
from slipstream.rollout.lengths import LiveLengths
from slipstream.rollout.price_rows import still_there

MOST_LEAST_PROBABILITY_OF_A_TREE = 0.4
"""Above it a second child, whose chance is below one half at best, is hardly ever worth its verification."""

REFRESH_EVERY = 16
"""Prices after which P(last) is computed anew for an unchanged batch: lengths move slowly beside decoding."""

HEDGE = 0.4
"""Weight of equal chances beside the estimated P(last): histories are short, lengths within a group are not independent
and the policy moves. Chosen on replays of the quickstart's task."""


MARGIN = 1.2
"""Factor of the least probability: an estimate is that of the best of several drafts, hence too high on the whole, and
a price that is too high loses less than one that is too low. Our own choice among 1 to 1.5, on the quickstart's task
and seeds that no bench uses."""


class BudgetPolicy(Protocol):
    """Prices draft tokens for the live batch."""

    def price(self, live: LiveBatch, cost: CostModel | None = None, lengths: LiveLengths | None = None) -> Price:
        """The most draft tokens per row, and the least acceptance probability worth verifying."""

    def observe(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """One verified step: [R] draft tokens verified and kept, of the rows that sampled."""


def chain_price(max_draft: np.ndarray, widths: Sequence[int] = ()) -> Price:
    """A price without a least probability: max_draft ([B]) rounded down to the nearest of `widths` (and 0), if any."""
    return Price(_runnable(max_draft, widths), np.zeros(len(max_draft), np.float32))


def _runnable(max_draft: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    limit = np.maximum(np.nan_to_num(max_draft, nan=0.0, posinf=2**15, neginf=0.0), 0).astype(np.int32)
    if not widths:
        return limit
    steps = np.unique([0, *widths]).astype(np.int32)
    return steps[np.searchsorted(steps, limit, side="right") - 1]


class ChainRate:
    """Share of judged draft tokens that were accepted: every kept token, and the first rejected one of each draft.

    Forgets with a horizon of about 1,000 steps, towards `prior` with the weight of 16 tokens, so that a rate that
    stopped all drafting is tried again.
    """

    def __init__(self, prior: float = 0.5) -> None:
        self._prior, self._judged, self._accepted = prior, 0.0, 0.0

    def observe(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """[R] draft tokens verified and kept."""
        self._judged = 0.999 * self._judged + float((accepted + (accepted < drafted)).sum())
        self._accepted = 0.999 * self._accepted + float(accepted.sum())

    @property
    def rate(self) -> float:
        """In (0, 1)."""
        return min(max((self._accepted + 16 * self._prior) / (self._judged + 16), 0.001), 0.999)


class OffBudget:
    """No drafting."""

    def price(self, live: LiveBatch, cost: CostModel | None = None, lengths: LiveLengths | None = None) -> Price:
        """Zero for every row."""
        return chain_price(np.zeros(len(live)))

    def observe(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Nothing to learn."""


class FixedBudget:
    """The same draft width for every request: the usual baseline."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens

    def price(self, live: LiveBatch, cost: CostModel | None = None, lengths: LiveLengths | None = None) -> Price:
        """num_draft_tokens for every row."""
        return chain_price(np.full(len(live), self.num_draft_tokens))

    def observe(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Nothing to learn."""


def least_probability(
    step: StepCost,
    chances: np.ndarray,
    num_live: np.ndarray | int,
    num_queued: np.ndarray | float = 0.0,
    speed: np.ndarray | float = 1.0,
    width: np.ndarray | float = 0.0,
) -> np.ndarray:
    """[B] c_tok speed_i / (lambda_i + c_tok (1 + width_i)), in [0, 1]: see PriceBudget; 0 where tokens are free.

    chances: [B] P(finishes last); num_live, num_queued: of the request's worker, one or [B]. speed, width: tokens
    gained and draft tokens verified per round.
    """
    rows = np.maximum(num_live, 1)
    waiting = num_queued / (num_queued + rows)
    last = (1.0 - waiting) * np.where(chances == chances, chances, 0.0) + waiting / rows
    spent = step.base * last + step.tok * (1.0 + width)
    with np.errstate(all="ignore"):
        least = step.tok * speed / spent
    # What is no number is worth no draft, unless tokens are free.
    return np.where(spent > 0.0, np.where(least <= 1.0, np.maximum(least, 0.0), 1.0), 0.0)


def priced(step: StepCost, chances: np.ndarray, lengths: LiveLengths | None, num_live: int) -> np.ndarray:
    """[B] float32, the least probability with hedge and margin of a live batch. Twin of kernels/csrc/price_rows.h, for
    batches of several workers too. chances: [B] P(finishes last); num_live: of the batch."""
    live: np.ndarray | int = num_live if lengths is None else lengths.num_live()
    queued = 0.0 if lengths is None else lengths.num_queued
    speed, width = (1.0, 0.0) if lengths is None else (lengths.speed, lengths.width)
    mixed = (1.0 - HEDGE) * chances + HEDGE / np.maximum(live, 1)
    least = least_probability(step, mixed, live, queued, speed, width)
    return np.minimum(MARGIN * least, 1.0).astype(np.float32)


class PriceBudget:
    """Draft token j of request i iff q_ij (lambda_i + c_tok (1 + g_i)) >= c_tok (1 + a_i).

    DAS minimises c_base N + c_tok (tokens) subject to: rounds of every request <= N (its Eq 4-6). Tokens counted as
    they are run, a request costs its rounds plus its drafts: l_i - A_i + p_i (DAS counts p_i alone). The Lagrangian has
    sum_i lambda_i = c_base and (lambda_i + c_tok) dA_i/dp_i = c_tok. Units: lambda_i and c_tok are seconds per round
    and seconds per token. dA/dp is taken over a whole response, and is not yet q_ij, the chance that token j of one
    draft is accepted with its path: with a_i tokens accepted and g_i drafted in a round, A = l a / (1 + a) and
    p = l g / (1 + a), and one more draft token a round, accepted with q = da/dg, gives dA/dp = q / (1 + a - g q). That
    is the rule above: a token accepted saves 1 / (1 + a) rounds, because a round gains 1 + a tokens, and a round costs
    its drafts too. It maximises (1 + a) / (lambda + c_tok (1 + g)), tokens for the price of a round. For a first draft
    (a = g = 0) it is (lambda_i + c_tok) q_ij >= c_tok. All of this is ours, and so is:

    - lengths are uncertain, so lambda_i = c_base P(i finishes last) (envelope theorem: the makespan falls by c_base
      only if the request that saves the round is the last one);
    - what a round saved also spares whoever finishes last, c_live + c_kv context_i, is left out: steps tell it badly
      from what tokens cost, and a price that is too high loses less than one that is too low;
    - the estimate of P is mixed with 1 / B (HEDGE), because it is one, and q_ij has to exceed the price by MARGIN;
    - while `num_queued` requests wait for a slot, every live one's round delays them alike: with weight
      num_queued / (num_queued + B) lambda_i is c_base / B.

    The rule per row is a least probability of q_ij, with a_i and g_i as measured so far: depth follows the request's
    length, the draft's own confidence, the live batch and the hardware. It holds of every node of a draft tree too,
    with the path to it: where the least probability is low, up to `branching` continuations of a token are verified
    side by side. Without lengths P = 1 / B; without a trusted cost, c_base / c_tok is the model's knee_tokens.
    estimates=False is for drafters that estimate no probability: q_ij is then the measured share of accepted tokens to
    the power j.
    """

    def __init__(
        self, max_draft_tokens: int, estimates: bool = True, widths: Sequence[int] = (), branching: int = 1
    ) -> None:
        self.max_draft_tokens, self.estimates, self.widths = max_draft_tokens, estimates, tuple(widths)
        self.branching = branching
        self.chain = ChainRate()
        self.last_chances = np.zeros(0)
        self._uids = np.zeros(0, np.int64)
        self._age = 0

    def price(self, live: LiveBatch, cost: CostModel | None = None, lengths: LiveLengths | None = None) -> Price:
        """max_draft_tokens for every row, and the row's least probability."""
        step = cost.cost if cost is not None else StepCost(32.0, 0.0, 0.0, 1.0)
        queued = 0.0 if lengths is None else lengths.num_queued
        chances = self._chances(live, lengths)
        if _native is not None and lengths is not None and lengths.owner is None:
            threshold: np.ndarray = _native.least_probabilities(
                chances, lengths.speed, lengths.width, step.base, step.tok, queued, HEDGE, MARGIN
            )
        else:
            threshold = priced(step, chances, lengths, len(live))
        return Price(self._depths(threshold), threshold, self._branches(threshold))

    def _depths(self, threshold: np.ndarray) -> np.ndarray:
        if self.estimates and not self.widths:
            return np.full(len(threshold), self.max_draft_tokens, np.int32)
        depth = np.full(len(threshold), self.max_draft_tokens, np.float64)
        if not self.estimates:
            depth = np.minimum(depth, np.floor(np.log(np.maximum(threshold, 1e-12)) / np.log(self.chain.rate)))
        return _runnable(depth, self.widths)

    def _branches(self, threshold: np.ndarray) -> np.ndarray | None:
        if self.branching < 2:
            return None
        trees = threshold <= MOST_LEAST_PROBABILITY_OF_A_TREE
        if not trees.any():
            return None
        return np.where(trees, self.branching, 1).astype(np.int32)

    def _chances(self, live: LiveBatch, lengths: LiveLengths | None) -> np.ndarray:
        rows = len(live)
        if lengths is None or rows < 2:
            self.last_chances, self._uids = np.full(rows, 1.0 / max(rows, 1)), live.uids
            return self.last_chances
        self._age += 1
        stayed = still_there(self._uids, live.uids)
        if stayed is None:
            self._age = REFRESH_EVERY
        elif rows < len(self._uids):
            left = self.last_chances[stayed]
            if lengths.owner is None and left.sum() > 0.0:
                # Some are done and nobody joined: the others share what was theirs, as if nothing else had changed.
                self.last_chances = left / left.sum()
            else:
                self._age = REFRESH_EVERY
        self._uids = live.uids
        if self._age >= REFRESH_EVERY:
            self.last_chances, self._age = finish_last(lengths, live.num_generated, live.num_remaining), 0
        return self.last_chances

    def observe(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """Keeps the share of accepted tokens, for drafters without estimates."""
        if not self.estimates:
            self.chain.observe(drafted, accepted)

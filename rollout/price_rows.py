"""What the price of a step is computed from, row by row of the live requests.

Invariants: kernels/csrc/price_rows.h and the plain twins here agree to the rounding of float32; where the extension is
not built the twins do the work. What numpy takes for this many small arrays is more than what the drafter takes for its
drafts.
"""

from __future__ import annotations

import numpy as np

from slipstream.kernels.native import _native
from slipstream.rollout.slots import SlotTable


def round_rates(
    table: SlotTable, slots: np.ndarray, prior_rounds: float, prior_drafted: float, prior_accepted: float
) -> tuple[np.ndarray, np.ndarray]:
    """([B] float32 tokens gained, [B] float64 draft tokens verified) per round of these slots.

    A slot is taken to have had prior_rounds more rounds, with prior_drafted and prior_accepted tokens in each.
    """
    rates = plain_round_rates if _native is None else _native.rates
    speed, width = rates(
        slots, table.rounds, table.drafted, table.accepted, prior_rounds, prior_drafted, prior_accepted
    )
    return speed, width


def plain_round_rates(
    slots: np.ndarray,
    rounds: np.ndarray,
    drafted: np.ndarray,
    accepted: np.ndarray,
    prior_rounds: float,
    prior_drafted: float,
    prior_accepted: float,
) -> tuple[np.ndarray, np.ndarray]:
    """See round_rates; rounds, drafted [slots], accepted [slots, sources]."""
    total = rounds[slots] + prior_rounds
    speed = 1.0 + (accepted[slots].sum(axis=1) + prior_rounds * prior_accepted) / total
    return speed.astype(np.float32), (drafted[slots] + prior_rounds * prior_drafted) / total


def still_there(before: np.ndarray, after: np.ndarray) -> np.ndarray | None:
    """[B] bool, which of the int64 uids `before` are among `after`; None unless `after` is some of them in their order,
    as where requests have left and nobody joined."""
    if _native is None:
        return plain_still_there(before, after)
    stayed: np.ndarray | None = _native.still_there(
        before.astype(np.int64, copy=False), after.astype(np.int64, copy=False)
    )
    return stayed


def plain_still_there(before: np.ndarray, after: np.ndarray) -> np.ndarray | None:
    """See still_there."""
    stayed = np.isin(before, after)
    return stayed if np.array_equal(before[stayed], after) else None


def invert_curve(curve: np.ndarray, probabilities: np.ndarray, prior_tokens: float) -> np.ndarray:
    """[n] float32: see AcceptanceModel.estimates_for. curve: [3, buckets] float64, at most 64 buckets."""
    invert = plain_invert_curve if _native is None else _native.estimates_for
    estimates: np.ndarray = invert(curve, probabilities.astype(np.float32, copy=False), prior_tokens)
    return estimates


def plain_invert_curve(curve: np.ndarray, probabilities: np.ndarray, prior_tokens: float) -> np.ndarray:
    """See invert_curve."""
    count, estimate, accepted = curve
    buckets = len(count)
    middle = (np.arange(buckets) + 0.5) / buckets
    at = (estimate + prior_tokens * middle) / (count + prior_tokens)
    share = np.maximum.accumulate((accepted + prior_tokens * middle) / (count + prior_tokens))
    # Strictly rising, so that the inverse is defined.
    share = np.clip(share, 0.0, 1.0) + 1e-9 * np.arange(buckets)
    found = np.interp(probabilities.astype(np.float32), [0.0, *share, 1.0 + 1e-6], [0.0, *at, 1.0])
    return found.astype(np.float32)

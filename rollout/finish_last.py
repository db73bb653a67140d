"""Who of the live batch will finish last, and whether such estimates come true.

Invariants: probabilities of a worker's live requests sum to 1; requests that nothing tells apart get equal shares;
what cannot be computed (no history, zero or NaN speeds) gives equal shares. Ours: DAS publishes no such estimate.
"""

from __future__ import annotations

import numpy as np

from slipstream.kernels.native import _native
from slipstream.rollout.lengths import PER_BIN, LiveLengths

NUM_COARSE, NUM_FINE = 10, 16
_COARSE = np.concatenate([np.geomspace(1 / 512, 0.97, NUM_COARSE - 1), [1.0]]).astype(np.float32)
_LEAST = np.float32(1e-20)
_BLOCK = 1024
_LEVELS = np.linspace(0.002, 0.998, NUM_FINE)


MANY = 512
"""Requests from which on arrays are quicker than one request after the other."""


def finish_last(lengths: LiveLengths, generated: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """[B] float64, P(request i needs more rounds than all others of its worker), from independent lengths.

    P_i = sum over time of dF_i(t) prod_{k != i} F_k(t), with F_k(t) the probability that k is done after t rounds of
    speed_k tokens. Two passes: a coarse one finds when the batch is likely to be done, a fine one looks there.
    generated: [B] tokens so far; remaining: [B] tokens that the limit leaves. Cost O(B).
    """
    if _native is None or lengths.owner is not None or len(generated) >= MANY:
        return plain_finish_last(lengths, generated, remaining)
    live = lengths.rows, generated, remaining, lengths.speed
    chances: np.ndarray = _native.finish_last(lengths.tables, PER_BIN, *live, _COARSE, _LEVELS)
    return chances


def plain_finish_last(lengths: LiveLengths, generated: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """See finish_last; also for batches of several workers."""
    rows = len(generated)
    if rows == 0:
        return np.zeros(0)
    owner = np.zeros(rows, np.int64) if lengths.owner is None else lengths.owner
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    place = np.repeat(np.arange(len(starts)), np.diff(starts, append=rows))
    longest = np.maximum.reduceat(np.maximum(remaining, 1) / lengths.speed, starts).astype(np.float32)

    def log_done(times: np.ndarray) -> np.ndarray:
        # In blocks: temporaries above 128 KiB would be fresh pages every time, which costs more than the arithmetic.
        out = np.empty((rows, times.shape[1]), np.float32)
        for i in range(0, rows, _BLOCK):
            block = slice(i, i + _BLOCK)
            ahead = times[place[block]] * lengths.speed[block, None]
            done = lengths.finished_within(generated[block], remaining[block], ahead, block)
            np.log(np.maximum(done, _LEAST, out=done), out=out[block])
        return out

    coarse = longest[:, None] * _COARSE
    all_done = np.add.reduceat(log_done(coarse), starts, axis=0)
    # Fine times where the batch is about as likely to get done between any two of them.
    fine = [np.interp(_LEVELS, done, at) for done, at in zip(np.exp(all_done), coarse, strict=True)]
    logs = log_done(np.array(fine, np.float32))
    total = np.add.reduceat(logs, starts, axis=0)
    chance = np.empty(rows, np.float32)
    for i in range(0, rows, _BLOCK):
        mine = logs[i : i + _BLOCK]
        done, others = np.exp(mine), np.exp(total[place[i : i + _BLOCK]] - mine)
        halves = (done[:, 1:] - done[:, :-1]) * (others[:, 1:] + others[:, :-1])
        # What lies beyond the span ends after everybody else has.
        chance[i : i + _BLOCK] = halves.sum(axis=1) / 2 + (1.0 - done[:, -1])
    chance = np.where(np.isfinite(chance), np.maximum(chance, 0.0), 0.0).astype(np.float64)
    sums = np.add.reduceat(chance, starts)[place]
    sizes = np.diff(starts, append=rows)[place]
    return np.where(sums > 1e-12, chance / np.maximum(sums, 1e-12), 1.0 / sizes)


class LastCalibration:
    """Compares P(finishes last), noted while a batch ran, with who did finish last.

    curve: [3, 10] float64 by tenth of the estimate: how many, the sum of the estimates, how many were last.
    """

    def __init__(self) -> None:
        self.curve = np.zeros((3, 10))
        self.squared_error = 0.0
        self._noted: list[tuple[np.ndarray, np.ndarray]] = []

    def note(self, uids: np.ndarray, chances: np.ndarray) -> None:
        """An estimate for live requests: [B] uids and probabilities."""
        self._noted.append((uids.copy(), chances.copy()))

    def settle(self, last_uids: np.ndarray) -> None:
        """The batch is done: these finished in its last step and share the outcome."""
        for uids, chances in self._noted:
            last = np.isin(uids, last_uids)
            outcome = last / max(1, int(last.sum()))
            tenth = np.minimum((chances * 10).astype(np.int64), 9)
            for row, weights in enumerate((np.ones(len(uids)), chances, outcome)):
                self.curve[row] += np.bincount(tenth, weights, 10)
            self.squared_error += float(((chances - outcome) ** 2).sum())
        self._noted.clear()

    def drop(self) -> None:
        """Forgets what is noted: requests joined, so that the estimates were about another batch."""
        self._noted.clear()

    def metrics(self) -> dict[str, float]:
        """das/last_brier (mean squared error), das/last_brier_uniform is not kept: compare with 1/B (1 - 1/B);
        das/last_calibration_error, and das/last_reliability/NN with the share that came last of every tenth."""
        count, estimate, outcome = self.curve
        total = count.sum()
        if total <= 0:
            return {}
        out = {
            "das/last_brier": self.squared_error / float(total),
            "das/last_calibration_error": float(np.abs(estimate - outcome).sum() / total),
        }
        for i in np.flatnonzero(count):
            out[f"das/last_reliability/{10 * i + 5:02d}"] = float(outcome[i] / count[i])
        return out

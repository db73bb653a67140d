"""Replays recorded texts token by token: the real drafter, the real policy, the real acceptance; only time is modelled.

Invariants: a draft token is accepted iff it is the recorded one, as in the engine; a step's seconds are what the cost
model says of its live requests, its cached tokens and its packed tokens; nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slipstream.drafter.base import DraftBatch, Drafter, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.rollout.acceptance import AcceptanceModel, calibrates_after
from slipstream.rollout.budget import BudgetPolicy
from slipstream.rollout.cost_model import StepCost
from slipstream.rollout.lengths import LengthModel, LiveLengths
from slipstream.rollout.packing import ROW_MULTIPLE
from slipstream.rollout.pricing import FADE_PER_STEP, PRIOR_ROUNDS
from slipstream.rollout.replay import KnownCost


@dataclass(frozen=True, slots=True)
class TokenReplay:
    """makespan_s: predicted; rounds: passes until the last text was done; the others are totals."""

    makespan_s: float
    rounds: int
    drafted: int
    accepted: int
    forward_tokens: int


class _Texts:
    """The texts side by side, padded with -1, which no draft token equals; at: [n] tokens decoded so far."""

    def __init__(self, texts: Sequence[HistoryRecord], prompts: Mapping[str, np.ndarray], width: int) -> None:
        self.uids = np.array([text.uid for text in texts], np.int64)
        self.lengths = np.array([len(text.tokens) for text in texts], np.int64)
        self.context = np.array([len(prompts[text.prompt_id]) for text in texts], np.int64)
        self.tokens = np.full((len(texts), int(self.lengths.max()) + width + 1), -1, np.int32)
        for row, text in enumerate(texts):
            self.tokens[row, : len(text.tokens)] = text.tokens
        self.at = np.zeros(len(texts), np.int64)
        self.rounds, self.drafted = np.zeros((2, len(texts)), np.int64)

    def live_batch(self, rows: np.ndarray, max_tokens: int) -> LiveBatch:
        at = self.at[rows].astype(np.int32)
        left = np.maximum(max_tokens - at, 1).astype(np.int32)
        return LiveBatch(self.uids[rows], at, left, (self.context[rows] + at).astype(np.int32))

    def usual(self, rows: np.ndarray, spent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens gained and drafted per round, as rollout.pricing estimates them."""
        rounds = self.rounds[rows] + PRIOR_ROUNDS
        speed = 1.0 + (self.at[rows] - self.rounds[rows] + PRIOR_ROUNDS * spent[1]) / rounds
        return speed, (self.drafted[rows] + PRIOR_ROUNDS * spent[0]) / rounds


def replay_tokens(
    texts: Sequence[HistoryRecord],
    prompts: Mapping[str, np.ndarray],
    drafter: Drafter,
    policy: BudgetPolicy,
    cost: StepCost,
    lengths: LengthModel,
    *,
    max_tokens: int,
    max_draft_tokens: int,
    acceptance: AcceptanceModel | None = None,
    spent: np.ndarray | None = None,
) -> TokenReplay:
    """Decodes all texts together, started at once. prompts: tokens by prompt_id; max_tokens: the length limit.

    acceptance: what was measured before; spent: [2] draft tokens verified and accepted per round; both go on learning.
    The prompts are computed once per prompt, in a step of their own, as the engine does.
    """
    acceptance = AcceptanceModel() if acceptance is None else acceptance
    drafter.calibrate(acceptance.probabilities())
    for text in texts:
        drafter.begin(text.uid, text.prompt_id, prompts[text.prompt_id])
    table = _Texts(texts, prompts, max_draft_tokens)
    names = [text.prompt_id for text in texts]
    tables = np.stack([lengths.table(name) for name in names])
    initial = np.array([lengths.initial_class(name) for name in names], np.int64)
    out = DraftBatch.empty(len(texts), max_draft_tokens)
    prefill = sum(len(prompts[name]) for name in set(names))
    seconds = float(cost.seconds(len(set(names)), prefill, _padded(prefill)))
    totals, steps, rows = np.zeros(3, np.int64), 0, np.arange(len(texts))
    known = KnownCost(cost)
    spent = np.zeros(2) if spent is None else spent
    while len(rows):
        live = table.live_batch(rows, max_tokens)
        speed, width = table.usual(rows, spent)
        view = LiveLengths(lengths, tables, rows, initial[rows], speed, width=width)
        price = policy.price(live, known, view)
        least = acceptance.estimates_for(price.min_accept_prob)
        limit = np.clip(np.minimum(price.max_draft, live.num_remaining - 1), 0, max_draft_tokens).astype(np.int32)
        out.clear(len(rows))
        if limit.any():
            drafter.propose(live, Price(limit, least), out)
        counts = out.count[: len(rows)].astype(np.int64)
        taken = _take(table, rows, out, drafter, max_tokens)
        steps += 1
        policy.observe(counts, np.minimum(taken - 1, counts))
        table.drafted[rows] += counts
        spent += (1.0 - FADE_PER_STEP) * (np.array([counts.mean(), (taken - 1).mean()]) - spent)
        ended = table.at[rows] >= table.lengths[rows]
        acceptance.observe(out.cells[: len(rows)], out.probs[: len(rows)], counts, np.minimum(taken - 1, counts), ended)
        if calibrates_after(steps):
            drafter.calibrate(acceptance.probabilities())
        packed = len(rows) + int(counts.sum())
        seconds += float(cost.seconds(len(rows), int(live.context_len.sum()), _padded(packed)))
        totals += [int(counts.sum()), int((taken - 1).sum()), packed]
        for uid in table.uids[rows[ended]].tolist():
            drafter.end(uid, finished=True)
        rows = rows[~ended]
    return TokenReplay(seconds, steps + 1, *totals.tolist())


def _take(table: _Texts, rows: np.ndarray, out: DraftBatch, drafter: Drafter, max_tokens: int) -> np.ndarray:
    """Accepts the right prefix of every draft and one token more; [B] tokens taken."""
    nth = np.arange(out.tokens.shape[1] + 1)
    right = table.tokens[rows[:, None], table.at[rows, None] + nth]
    agrees = (out.tokens[: len(rows)] == right[:, :-1]) & (nth[:-1] < out.count[: len(rows), None])
    taken = np.minimum(np.cumprod(agrees, axis=1).sum(axis=1) + 1, table.lengths[rows] - table.at[rows])
    table.at[rows] += taken
    table.rounds[rows] += 1
    offsets = np.concatenate([[0], np.cumsum(taken)]).astype(np.int64)
    drafter.extend(table.live_batch(rows, max_tokens), Ragged(right[nth < taken[:, None]], offsets))
    return taken


def _padded(tokens: int) -> int:
    return tokens + -tokens % ROW_MULTIPLE

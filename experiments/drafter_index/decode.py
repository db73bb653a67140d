"""Teacher-forced decoding: known texts, decoded as an engine would with this drafter, and what it cost.

Invariants: all texts start together and leave as they end; each round proposes for the whole live batch, accepts the
longest right prefix of every draft and one token more, and extends; only propose (with the clearing of its buffers) and
extend are timed. A round that reaches the end of its text counts one accepted token less than it takes, as the engine
counts it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slipstream.drafter.base import DraftBatch, Drafter, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.rollout.acceptance import AcceptanceModel, calibrates_after

MIN_ACCEPT_PROB = 0.1
NO_PROMPT = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Decoded:
    """rounds, drafted, accepted: [texts] int64, by text. step_us, wall_us: CPU microseconds of this thread, and wall
    ones, of propose + extend, one for every step in which all texts were live."""

    rounds: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    step_us: list[float]
    wall_us: list[float]


class _Clock:
    """CPU seconds of this thread and wall seconds between start and stop, summed; starts at once."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0
        self.start()

    def start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def stop(self) -> None:
        self.cpu_s += time.thread_time() - self._cpu
        self.wall_s += time.perf_counter() - self._wall


class _Texts:
    """The texts side by side, padded with -1, which no draft token equals; at: [rows] int32, tokens decoded."""

    def __init__(self, texts: Sequence[HistoryRecord], prompts: Mapping[str, np.ndarray], width: int) -> None:
        self.uids = np.array([text.uid for text in texts], np.int64)
        self.lengths = np.array([len(text.tokens) for text in texts], np.int32)
        self.prompt_lengths = np.array([len(prompts.get(text.prompt_id, NO_PROMPT)) for text in texts], np.int32)
        self.tokens = np.full((len(texts), int(self.lengths.max()) + width + 1), -1, np.int32)
        for row, text in enumerate(texts):
            self.tokens[row, : len(text.tokens)] = text.tokens
        self.at = np.zeros(len(texts), np.int32)
        self._next = np.arange(width + 1)

    def live_batch(self, rows: np.ndarray, max_tokens: int) -> LiveBatch:
        at = self.at[rows]
        return LiveBatch(self.uids[rows], at, max_tokens - at, self.prompt_lengths[rows] + at)

    def judge(self, rows: np.ndarray, out: DraftBatch) -> tuple[np.ndarray, Ragged]:
        """(tokens taken by each row, those tokens)."""
        right = self.tokens[rows[:, None], self.at[rows, None] + self._next]
        within = self._next[:-1] < out.count[: len(rows), None]
        agrees = (out.tokens[: len(rows)] == right[:, :-1]) & within
        accepted = np.cumprod(agrees, axis=1).sum(axis=1)
        taken = np.minimum(accepted + 1, self.lengths[rows] - self.at[rows])
        offsets = np.concatenate([[0], np.cumsum(taken)]).astype(np.int64)
        return taken, Ragged(right[self._next < taken[:, None]], offsets)


def decode(
    drafter: Drafter,
    texts: Sequence[HistoryRecord],
    width: int,
    prompts: Mapping[str, np.ndarray] | None = None,
    max_steps: int | None = None,
    max_tokens: int | None = None,
    min_accept_prob: float = MIN_ACCEPT_PROB,
    acceptance: AcceptanceModel | None = None,
) -> Decoded:
    """Decodes non-empty texts with different uids, drafting at most `width` tokens a row.

    prompts: [p] int32 each by prompt_id, none where absent. max_steps: stop there (None: at the end of all texts).
    max_tokens: the limit that the requests were sampled under (None: the longest text). min_accept_prob: as in Price.
    acceptance: learns from every step and calibrates the drafter as often as the engine does (None: a fresh one).
    """
    prompts = prompts or {}
    acceptance = acceptance or AcceptanceModel()
    drafter.calibrate(acceptance.probabilities())
    for text in texts:
        drafter.begin(text.uid, text.prompt_id, prompts.get(text.prompt_id, NO_PROMPT))
    table, steps = _Texts(texts, prompts, width), 0
    rounds, drafted, accepted = np.zeros((3, len(texts)), np.int64)
    done = Decoded(rounds, drafted, accepted, [], [])
    limit = max_tokens or int(table.lengths.max())
    out = DraftBatch.empty(len(texts), width)
    rows = np.arange(len(texts))
    while len(rows) and (max_steps is None or steps < max_steps):
        live = table.live_batch(rows, limit)
        price = Price(np.minimum(width, live.num_remaining - 1), np.full(len(rows), min_accept_prob, np.float32))
        clock = _Clock()
        out.clear(len(rows))
        drafter.propose(live, price, out)
        clock.stop()
        taken, tokens = table.judge(rows, out)
        table.at[rows] += taken.astype(np.int32)
        live = table.live_batch(rows, limit)
        clock.start()
        drafter.extend(live, tokens)
        clock.stop()
        if len(rows) == len(texts):
            done.step_us.append(1e6 * clock.cpu_s)
            done.wall_us.append(1e6 * clock.wall_s)
        _learn(acceptance, drafter, out, taken, table.at[rows] >= table.lengths[rows], steps)
        rounds[rows] += 1
        drafted[rows] += out.count[: len(rows)]
        accepted[rows] += taken - 1
        steps += 1
        rows = _leave(drafter, table, rows)
    for row in rows:
        drafter.end(int(table.uids[row]), finished=False)
    return done


def _learn(
    acceptance: AcceptanceModel, drafter: Drafter, out: DraftBatch, taken: np.ndarray, ended: np.ndarray, step: int
) -> None:
    rows = len(taken)
    accepted = np.minimum(taken - 1, out.count[:rows])
    acceptance.observe(out.cells[:rows], out.probs[:rows], out.count[:rows], accepted, ended)
    if calibrates_after(step + 1):
        drafter.calibrate(acceptance.probabilities())


def _leave(drafter: Drafter, table: _Texts, rows: np.ndarray) -> np.ndarray:
    """Ends the texts that are complete; the rows that stay."""
    ended = table.at[rows] >= table.lengths[rows]
    for uid in table.uids[rows[ended]].tolist():
        drafter.end(uid, finished=True)
    return rows[~ended]

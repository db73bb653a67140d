"""A native suffix index set behind lists: what its tests share."""

from __future__ import annotations

import numpy as np

from slipstream.drafter.base import SOURCE_NAMES
from slipstream.kernels import _native  # type: ignore[attr-defined]

Sequences = list[list[int]]


def arrays(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, sequences)])
    return np.array([token for tokens in sequences for token in tokens], np.int32), offsets


def publish(index: _native.SuffixIndexSet, prompt: str, sequences: Sequences, weights: list[float]) -> None:
    values, offsets = arrays(sequences)
    index.publish(prompt, values, offsets, np.array(weights, np.float32), np.ones(len(weights), np.uint8))
    index.wait()


def begin(index: _native.SuffixIndexSet, uid: int, prompt: str, text: tuple[int, ...] = ()) -> None:
    index.begin(uid, prompt, np.array(text, np.int32))


def extend(index: _native.SuffixIndexSet, uids: list[int], tokens: Sequences) -> None:
    index.extend(np.array(uids), *arrays(tokens))


class Drafts:
    """One propose call; row i of tokens and probs cut to its count."""

    def __init__(
        self, index: _native.SuffixIndexSet, uids: list[int], limit: int, min_prob: float = 0.0, branching: int = 1
    ) -> None:
        rows = len(uids)
        tokens, probs = np.full((rows, limit), -7, np.int32), np.zeros((rows, limit), np.float32)
        cells, parents = np.zeros((rows, limit), np.int16), np.zeros((rows, limit), np.int16)
        count, source, match_len = np.zeros(rows, np.int32), np.zeros(rows, np.int8), np.zeros(rows, np.int32)
        limits, min_probs = np.full(rows, limit, np.int32), np.full(rows, min_prob, np.float32)
        age, widths = np.zeros(rows, np.int32), np.full(rows, branching, np.int32)
        index.propose(
            np.array(uids), limits, min_probs, widths, tokens, count, source, age, match_len, probs, cells, parents
        )
        self.age = age.tolist()
        self.parents = [row[:n].tolist() for row, n in zip(parents, count, strict=True)]
        self.cells = [row[:n].tolist() for row, n in zip(cells, count, strict=True)]
        self.tokens = [row[:n].tolist() for row, n in zip(tokens, count, strict=True)]
        self.probs = [row[:n].tolist() for row, n in zip(probs, count, strict=True)]
        self.source = [SOURCE_NAMES[i] for i in source]
        self.match_len = match_len.tolist()


def fibonacci_word(length: int) -> list[int]:
    a, b = [0], [0, 1]
    while len(b) < length:
        a, b = b, b + a
    return b[:length]


TEXTS = {
    "unary": [3] * 60,
    "pair": [0, 1] * 30,
    "triple": [0, 1, 1] * 20,
    "fibonacci": fibonacci_word(60),
    "distinct": list(range(60)),
}

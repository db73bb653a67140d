"""Documents side by side in one row, as if each had the row to itself.

Invariants: no document is split; position ids restart at 0 in each document; a token sees only earlier tokens
of its own document, so packed logits equal those of separate passes; a label is set only where the next token
is to be learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IGNORE = -100
"""Label of a position that carries no loss (torch's default `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Document:
    """A prompt and its answer: tokens [n] int32; the last n - prompt_len are learned; prompt_len >= 1."""

    tokens: np.ndarray
    prompt_len: int


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of one length, all arrays [rows, row_tokens] int64.

    document_ids: from 0 within the row, -1 on padding. labels: the next token, or IGNORE on prompts and
    padding.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray
    labels: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.document_ids >= 0).sum())

    def attention_mask(self) -> np.ndarray:
        """[rows, 1, row_tokens, row_tokens] bool, True where the second-last axis may look at the last.

        Padding sees itself alone: an empty row of a softmax would be NaN.
        """
        same = self.document_ids[:, :, None] == self.document_ids[:, None, :]
        causal = np.tri(self.tokens.shape[1], dtype=bool)
        padding = (self.document_ids < 0)[:, :, None]
        return ((same & causal & ~padding) | np.eye(self.tokens.shape[1], dtype=bool))[:, None]


def assign_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: the documents of each row, as indices; ValueError when one does not fit."""
    rows: list[list[int]] = []
    space: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > row_tokens:
            raise ValueError(f"document {index} has {lengths[index]} tokens; a row holds {row_tokens}")
        row = next((r for r, free in enumerate(space) if free >= lengths[index]), None)
        if row is None:
            rows.append([])
            space.append(row_tokens)
            row = len(rows) - 1
        rows[row].append(index)
        space[row] -= lengths[index]
    return rows


def pack(documents: Sequence[Document], row_tokens: int, pad_id: int) -> PackedRows:
    """Packs `documents` into as few rows of `row_tokens` as first-fit decreasing finds."""
    rows = assign_rows([len(document.tokens) for document in documents], row_tokens)
    shape = (len(rows), row_tokens)
    packed = PackedRows(
        tokens=np.full(shape, pad_id, np.int64),
        position_ids=np.zeros(shape, np.int64),
        document_ids=np.full(shape, -1, np.int64),
        labels=np.full(shape, IGNORE, np.int64),
    )
    for row, members in enumerate(rows):
        start = 0
        for number, index in enumerate(members):
            document = documents[index]
            n, end = len(document.tokens), start + len(document.tokens)
            packed.tokens[row, start:end] = document.tokens
            packed.position_ids[row, start:end] = np.arange(n)
            packed.document_ids[row, start:end] = number
            answer = document.tokens[document.prompt_len :]
            packed.labels[row, end - 1 - len(answer) : end - 1] = answer
            start = end
    return packed

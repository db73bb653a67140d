"""Prompt lookup: copy what followed the last occurrence of the current n-gram in the request's own text.

The usual model-free baseline (Saxena, "Prompt Lookup Decoding", 2023). Invariant: a request sees its own prompt and
response only.
"""

from __future__ import annotations

import numpy as np

from slipstream.drafter.base import (
    SOURCE_PROMPT,
    SOURCE_SELF,
    DraftBatch,
    HistoryRecord,
    LiveBatch,
    Price,
    Ragged,
)


class _Context:
    """One request's text and, per n, where each n-gram was last seen (the index after it)."""

    def __init__(self, prompt: list[int], sizes: range) -> None:
        self.tokens: list[int] = []
        self.prompt_len = len(prompt)
        self._sizes = sizes
        self._seen: dict[tuple[int, ...], int] = {}
        self.extend(prompt)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            end = len(self.tokens)
            # An n-gram is entered when its follower arrives, so that a look-up never finds the text's own end.
            for n in self._sizes:
                if end >= n:
                    self._seen[tuple(self.tokens[end - n : end])] = end
            self.tokens.append(token)

    def lookup(self) -> tuple[int, int] | None:
        """(start of the continuation, n) for the longest n-gram known."""
        for n in reversed(self._sizes):
            at = self._seen.get(tuple(self.tokens[-n:])) if len(self.tokens) >= n else None
            if at is not None:
                return at, n
        return None


class NgramDrafter:
    """Looks up the last `max_ngram` down to `min_match` tokens."""

    name = "ngram"

    def __init__(self, min_match: int = 2, max_ngram: int = 4) -> None:
        self._sizes = range(min_match, max(min_match, max_ngram) + 1)
        self._open: dict[int, _Context] = {}

    def begin(self, uid: int, prompt_id: str, prompt: np.ndarray) -> None:
        """Opens a request."""
        if uid in self._open:
            raise ValueError(f"uid {uid} is open already")
        self._open[uid] = _Context(prompt.tolist(), self._sizes)

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        """Copies the continuation of the longest known n-gram."""
        for row, uid in enumerate(batch.uids.tolist()):
            limit = int(price.max_draft[row])
            if limit == 0:
                continue
            context = self._open[uid]
            found = context.lookup()
            if found is None:
                continue
            start, size = found
            draft = context.tokens[start : start + limit]
            out.tokens[row, : len(draft)] = draft
            out.count[row] = len(draft)
            out.match_len[row] = size
            out.source[row] = SOURCE_PROMPT if start < context.prompt_len else SOURCE_SELF

    def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
        """Appends what was committed."""
        for row, uid in enumerate(batch.uids.tolist()):
            self._open[uid].extend(accepted.row(row).tolist())

    def end(self, uid: int, finished: bool) -> None:
        """Closes a request and forgets it."""
        del self._open[uid]

    def calibrate(self, probabilities: np.ndarray) -> None:
        """Estimates no probability."""

    def publish(self, step: int, records: list[HistoryRecord]) -> None:
        """Keeps no history."""

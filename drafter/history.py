"""The window over past rollouts: what the drafter remembers, per prompt.

Invariants: a visit is one training step that sampled the prompt; a prompt keeps its last `window_epochs` visits;
records of a visit stay in the order they came. What is remembered is a pure function of the records in the order they
were added; `token_log` keeps them on disk, so that a resumed job remembers the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from slipstream.drafter.base import HistoryRecord


class HistoryLog:
    """Finished rollouts of every prompt, newest visit last."""

    def __init__(self, window_epochs: int) -> None:
        if window_epochs < 1:
            raise ValueError(f"window_epochs is {window_epochs}; allowed: at least 1")
        self.window_epochs = window_epochs
        self._visits: dict[str, OrderedDict[int, list[HistoryRecord]]] = {}

    def add(self, records: Iterable[HistoryRecord]) -> None:
        """Appends finished rollouts and drops visits that left the window."""
        for record in records:
            visits = self._visits.setdefault(record.prompt_id, OrderedDict())
            visits.setdefault(record.step, []).append(record)
            while len(visits) > self.window_epochs:
                visits.popitem(last=False)

    def visits(self, prompt_id: str) -> list[list[HistoryRecord]]:
        """The remembered visits of a prompt, oldest first."""
        return list(self._visits.get(prompt_id, {}).values())

    def remembers(self, record: HistoryRecord) -> bool:
        """Whether the record's visit is in the window."""
        return record.step in self._visits.get(record.prompt_id, {})

    def __iter__(self) -> Iterator[HistoryRecord]:
        for visits in self._visits.values():
            for records in visits.values():
                yield from records

    def num_tokens(self) -> int:
        """Response tokens remembered."""
        return sum(len(record.tokens) for record in self)

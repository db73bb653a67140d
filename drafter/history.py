"""The token log of past rollouts: what the drafter remembers, per prompt.

Invariants: a visit is one training step that sampled the prompt; a prompt keeps its last `window_epochs` visits;
records of a visit stay in the order they came. The log is plain data (numpy in, numpy out), so it travels between
workers and into checkpoints without code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np

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

    def __iter__(self) -> Iterator[HistoryRecord]:
        for visits in self._visits.values():
            for records in visits.values():
                yield from records

    def num_tokens(self) -> int:
        """Response tokens remembered."""
        return sum(len(record.tokens) for record in self)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The log as flat arrays: tokens int32, offsets int64, steps int64, uids int64, prompt_ids (UTF-8, newline
        separated) uint8."""
        records = list(self)
        offsets = np.zeros(len(records) + 1, np.int64)
        np.cumsum([len(record.tokens) for record in records], out=offsets[1:])
        tokens = [record.tokens for record in records]
        names = "\n".join(record.prompt_id for record in records).encode()
        return {
            "tokens": np.concatenate(tokens).astype(np.int32) if tokens else np.zeros(0, np.int32),
            "offsets": offsets,
            "steps": np.array([record.step for record in records], np.int64),
            "uids": np.array([record.uid for record in records], np.int64),
            "prompt_ids": np.frombuffer(names, np.uint8).copy(),
        }

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> list[HistoryRecord]:
        """The records of `to_arrays`. Raises ValueError when the arrays do not fit together."""
        offsets, steps, uids = arrays["offsets"], arrays["steps"], arrays["uids"]
        names = arrays["prompt_ids"].tobytes().decode().split("\n") if len(steps) else []
        if not len(names) == len(steps) == len(uids) == len(offsets) - 1 or offsets[-1] != len(arrays["tokens"]):
            raise ValueError(
                f"history arrays disagree: {len(names)} prompts, {len(steps)} steps, {len(offsets)} offsets"
            )
        return [
            HistoryRecord(name, int(steps[i]), int(uids[i]), arrays["tokens"][offsets[i] : offsets[i + 1]])
            for i, name in enumerate(names)
        ]

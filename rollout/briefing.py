"""What a worker that comes late has to be told: the weights, the history in the window, and what was learned.

Invariants
- It holds what was passed to the workers and nothing else; a newcomer that is told all of it is as the others are.
- The window is kept by the records themselves, which the job keeps anyway; of the weights the newest are kept, as the
  handle that was passed.
- Publishes are numbered: one that takes place while a newcomer is being told the window is told to it afterwards, so
  that no record reaches it twice or never.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.history import HistoryLog
from slipstream.rollout.learned import Learned, observe_records
from slipstream.rollout.lengths import LengthModel
from slipstream.rollout.weight_handle import WeightHandle


@dataclass(frozen=True, slots=True)
class Told:
    """One call of a worker's `publish`. serial: how many publishes its receiver knows afterwards."""

    serial: int
    step: int
    records: list[HistoryRecord]
    learned: Learned | None


class Briefing:
    """The memory of the pool. window_epochs: visits of a prompt that drafters remember."""

    def __init__(self, window_epochs: int) -> None:
        self._history = HistoryLog(window_epochs)
        self._lengths = LengthModel()
        self._learned: Learned | None = None
        self._step = 0
        self._since: list[Told] = []
        self.weights: WeightHandle | None = None
        self.num_published = 0

    @property
    def version(self) -> int:
        """Of the weights that are served."""
        return 0 if self.weights is None else self.weights.version

    def publish(self, step: int, records: list[HistoryRecord], learned: Learned | None) -> None:
        """A step boundary, as rollout.worker's publish."""
        self._step = step
        self._history.add(records)
        if learned is not None:
            self._learned = learned
        if learned is not None and learned.lengths is not None:
            self._lengths = copy.deepcopy(learned.lengths)
        else:
            observe_records(self._lengths, records)
        self.num_published += 1
        self._since.append(Told(self.num_published, step, records, self._without_lengths()))

    def next_for(self, known: int) -> Told | None:
        """What a worker that knows `known` publishes is told next; None when it knows all of them."""
        if known == self.num_published:
            return None
        if known == 0:
            records = sorted(self._history, key=lambda record: record.step)
            learned = Learned(lengths=self._lengths)
            if self._learned is not None:
                learned = Learned(self._learned.acceptance, self._learned.cost, self._lengths)
            return Told(self.num_published, self._step, records, learned)
        return next(told for told in self._since if told.serial == known + 1)

    def everybody_knows(self) -> None:
        """Nobody is being told the window: single publishes are needed no more."""
        self._since.clear()

    def _without_lengths(self) -> Learned | None:
        return None if self._learned is None else self._learned.without_lengths()

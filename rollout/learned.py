"""What a job has measured about its own speculation: the part of its memory that is no text.

Invariants: plain sums and counts; models of several workers are added; what is older fades at the step boundary; JSON
in and out, so that a resumed job prices its drafts as the stopped one would have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.cost_model import CostModel
from slipstream.rollout.guard import GuardState
from slipstream.rollout.lengths import LengthModel


@dataclass(frozen=True, slots=True)
class Observed:
    """What one worker observed since it was last asked: acceptance of its drafts, cost of its steps, and metrics of its
    pricing. guard: its state now; None where no guard watches."""

    acceptance: AcceptanceModel
    cost: CostModel
    metrics: dict[str, float]
    guard: GuardState | None = None


@dataclass(slots=True)
class Learned:
    """acceptance: what was observed of the drafts; cost: what steps took; lengths: of finished rollouts, None where
    the receiver learns them from the records itself; guards: of the workers, in their order, for those that start."""

    acceptance: AcceptanceModel = field(default_factory=AcceptanceModel)
    cost: CostModel = field(default_factory=CostModel)
    lengths: LengthModel | None = field(default_factory=LengthModel)
    guards: list[GuardState] = field(default_factory=list)

    def observe(self, observed: Iterable[Observed]) -> AcceptanceModel:
        """Takes in what the workers observed in a step; returns the step's own acceptance."""
        of_step = AcceptanceModel()
        self.acceptance.fade()
        self.cost.fade()
        self.guards = []
        for worker in observed:
            of_step.add(worker.acceptance)
            self.cost.add(worker.cost)
            if worker.guard is not None:
                self.guards.append(worker.guard)
        self.acceptance.add(of_step)
        return of_step

    def without_lengths(self) -> Learned:
        """The same for workers that go on: they have seen the same records, and their guards know themselves."""
        return Learned(self.acceptance, self.cost, None)

    def to_arrays(self) -> dict[str, Any]:
        """Everything as lists, for JSON."""
        lengths = {} if self.lengths is None else self.lengths.to_arrays()
        guards = [guard.to_arrays() for guard in self.guards]
        models = {"acceptance": self.acceptance.to_arrays(), "cost": self.cost.to_arrays(), "lengths": lengths}
        return models | {"guards": guards}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Learned:
        """What `to_arrays` wrote; KeyError or ValueError name what is missing or impossible."""
        return cls(
            AcceptanceModel.from_arrays(arrays["acceptance"]),
            CostModel.from_arrays(arrays["cost"]),
            LengthModel.from_arrays(arrays["lengths"]),
            [GuardState.from_arrays(guard) for guard in arrays["guards"]],
        )


def observe_records(lengths: LengthModel, records: Sequence[HistoryRecord]) -> None:
    """Takes the lengths of finished rollouts into `lengths`."""
    lengths.observe([r.prompt_id for r in records], [len(r.tokens) for r in records], [r.censored for r in records])

"""What may be generated ahead of the learner, and which groups the next step trains on.

Invariants
- No group is trained on that is staler than `max_staleness_steps`; see the derivation below.
- Numbers are admitted in increasing order, and a group leaves exactly once: trained, dropped (with its reason) or
  closed early. admitted = trained + dropped + closed + still here, after every call; a sample that arrives for a group
  which has left is counted as late, an unknown or repeated one is an error.
- Pure: fed with events, it decides; engines and actors act.

Derivation of the bound. Write n for the groups of a step, S for max_staleness_steps, and v for the published version;
step v + 1 trains from version v. A group admitted at version v holds no token older than v, and training on it in step
t makes its staleness (t - 1) - v. That stays within S exactly when t <= v + S + 1: the group's *due* step. All groups
can meet their due steps if and only if, for every step d from the next one, t, on,
    (groups not yet trained that are due by d) <= n * (d - t + 1),                                              (1)
which is the feasibility of earliest due date first. A new group has the latest due step of all, v + S + 1, so admitting
it keeps (1) as long as
    groups not yet trained + (n if step v + 1 is training) < n * (S + 1):                                       (2)
n * (S + 1) slots, charged at admission and given back when the *update* of the group's step is published, not when the
learner takes the batch. `take` keeps (1) for the step after: a group may be overtaken by younger ones that finished
before it as long as (1) holds without it, and is waited for otherwise, so that a straggler blocks the learner only when
its due step has come or its place is needed.

Over-sampling. `num_extra_groups` = k more slots let up to k groups more be in flight than (1) allows. In every `take`
at most k groups are closed: what is in excess of (1) leaves untrained, the least finished groups first. With S = 0 the
extra slots, too, wait for the update: a group admitted while step v + 1 trains is due by v + S + 1, which has begun.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Group(Generic[T]):
    """number: place in the job's order of groups; uids: its samples'; version: published when it was admitted; due: the
    last step that may train on it; results: what was delivered, by uid."""

    number: int
    uids: tuple[int, ...]
    version: int
    due: int
    results: dict[int, T] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every sample was delivered."""
        return len(self.results) == len(self.uids)


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """What step `step` trains on, in order of admission, and the groups that were closed for it."""

    step: int
    groups: list[Group[T]]
    closed: list[Group[T]]


@dataclass(slots=True)
class BufferCounts:
    """Groups, since the start: admitted, trained, closed early, dropped by reason; late: samples of left groups."""

    admitted: int = 0
    trained: int = 0
    closed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    late: int = 0


class WorkBuffer(Generic[T]):
    """Admission, completion and choice of groups for one job.

    num_groups_per_step: n. max_staleness_steps: S. num_extra_groups: k. last_step: nothing is admitted that no step up
    to this one can train on. version: what is published when the buffer starts.
    """

    def __init__(
        self,
        num_groups_per_step: int,
        max_staleness_steps: int,
        last_step: int,
        num_extra_groups: int = 0,
        version: int = 0,
    ) -> None:
        if num_groups_per_step < 1 or max_staleness_steps < 0 or num_extra_groups < 0:
            raise ValueError(
                f"num_groups_per_step={num_groups_per_step}, max_staleness_steps={max_staleness_steps}, "
                f"num_extra_groups={num_extra_groups}; allowed: at least 1, 0 and 0"
            )
        self.version = version
        self.counts = BufferCounts()
        self._per_step, self._staleness = num_groups_per_step, max_staleness_steps
        self._extra, self._last_step = num_extra_groups, last_step
        self._groups: dict[int, Group[T]] = {}
        self._group_of: dict[int, int] = {}
        self._left_uids: set[int] = set()
        self._training: list[Group[T]] = []
        self._highest = -1

    @property
    def next_step(self) -> int:
        """The step that the next `take` is for."""
        return self.version + (2 if self._training else 1)

    @property
    def capacity(self) -> int:
        """Slots: the most groups that are ever here at once."""
        return self._per_step * (self._staleness + 1) + self._extra

    @property
    def num_free(self) -> int:
        """Groups that may be admitted now."""
        if (self._training and not self._staleness) or self.next_step > self._last_step:
            return 0
        slots = self.capacity - len(self._groups) - len(self._training)
        steps_left = self._last_step - self.next_step + 1
        return max(0, min(slots, steps_left * self._per_step + self._extra - len(self._groups)))

    @property
    def num_complete(self) -> int:
        """Groups that wait to be trained on."""
        return sum(group.complete for group in self._groups.values())

    def outstanding(self) -> list[int]:
        """Numbers of the groups that were admitted and have not left, those in training included, in order."""
        return sorted([*self._groups, *(group.number for group in self._training)])

    def in_flight(self) -> list[int]:
        """The uids that are still waited for, in order of admission."""
        return [uid for group in self._groups.values() for uid in group.uids if uid not in group.results]

    def admit(self, number: int, uids: Sequence[int]) -> None:
        """Takes a slot for a group whose generation starts now. ValueError: no room, or a number or uid seen before."""
        if self.num_free < 1:
            raise ValueError(f"group {number}: no slot is free ({self.capacity} in all)")
        if number <= self._highest:
            raise ValueError(f"group {number} comes after group {self._highest}; numbers are admitted in order")
        if not uids or len(set(uids)) < len(uids) or any(uid in self._group_of for uid in uids):
            raise ValueError(f"group {number} has no uid, or one that is here already")
        self._highest = number
        self._groups[number] = Group(number, tuple(uids), self.version, self.version + self._staleness + 1)
        self._group_of.update(dict.fromkeys(uids, number))
        self.counts.admitted += 1

    def finish(self, uid: int, result: T) -> Group[T] | None:
        """Delivers a sample; the group that it completes, else None. A sample of a group that left is counted."""
        if uid in self._left_uids:
            self._left_uids.discard(uid)
            self.counts.late += 1
            return None
        if uid not in self._group_of:
            raise ValueError(f"uid {uid} was not admitted, or was delivered before")
        group = self._groups[self._group_of.pop(uid)]
        group.results[uid] = result
        return group if group.complete else None

    def drop(self, number: int, reason: str) -> Group[T]:
        """Takes a group out untrained: its slot is free at once."""
        group = self._leave(self._groups[number])
        self.counts.dropped[reason] += 1
        return group

    def take(self) -> Batch[T] | None:
        """The groups of the next step, or None as long as one has to be waited for. The oldest complete ones go first.

        RuntimeError while a step is training: one batch is out at a time.
        """
        if self._training:
            raise RuntimeError(f"step {self.version + 1} is still training")
        chosen = [group for group in self._groups.values() if group.complete][: self._per_step]
        if len(chosen) < self._per_step:
            return None
        closed = self._excess_without({group.number for group in chosen})
        if len(closed) > self._extra:
            return None
        for group in closed:
            self._leave(group)
        for group in chosen:
            del self._groups[group.number]
        self._training = chosen
        self.counts.closed += len(closed)
        return Batch(self.version + 1, chosen, closed)

    def waited_for(self) -> list[int]:
        """Numbers of the incomplete groups, the ones due first in front: who to name when the learner starves."""
        return [group.number for group in self._groups.values() if not group.complete]

    def publish(self) -> int:
        """The update of the step in training is published: its slots are free. Returns the new version."""
        if not self._training:
            raise RuntimeError("no step is training")
        self.counts.trained += len(self._training)
        self._training = []
        self.version += 1
        return self.version

    def _excess_without(self, chosen: set[int]) -> list[Group[T]]:
        """The fewest groups whose leaving makes (1) hold for the step after the next, `chosen` being trained."""
        rest = [group for group in self._groups.values() if group.number not in chosen]
        closed: list[Group[T]] = []
        for due in sorted({group.due for group in rest}):
            by_then = [group for group in rest if group.due <= due and group not in closed]
            excess = len(by_then) - self._per_step * (due - self.next_step)
            least_finished = sorted(by_then, key=lambda group: (len(group.results), -group.number))
            closed += least_finished[: max(0, excess)]
        return closed

    def _leave(self, group: Group[T]) -> Group[T]:
        del self._groups[group.number]
        for uid in group.uids:
            if self._group_of.pop(uid, None) is not None:
                self._left_uids.add(uid)
        return group

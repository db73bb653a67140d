"""The work buffer under any interleaving: the bound on staleness, exactly once, nothing uncounted, no deadlock."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slipstream.trainer.work_buffer import Batch, WorkBuffer


def uids_of(number: int, num_samples: int) -> list[int]:
    return [10 * number + sample for sample in range(num_samples)]


def finish(buffer: WorkBuffer[str], *numbers: int, num_samples: int = 2) -> None:
    for number in numbers:
        for uid in uids_of(number, num_samples):
            buffer.finish(uid, "done")


def admit(buffer: WorkBuffer[str], *numbers: int, num_samples: int = 2) -> None:
    for number in numbers:
        buffer.admit(number, uids_of(number, num_samples))


def numbers(batch: Batch[str] | None) -> list[int]:
    assert batch is not None
    return [group.number for group in batch.groups]


def test_staleness_zero_takes_turns() -> None:
    buffer: WorkBuffer[str] = WorkBuffer(2, 0, last_step=9)
    assert buffer.num_free == 2
    admit(buffer, 0, 1)
    finish(buffer, 1)
    assert buffer.take() is None
    assert buffer.waited_for() == [0]
    finish(buffer, 0)
    assert numbers(buffer.take()) == [0, 1]
    assert buffer.num_free == 0, "nothing runs ahead while the step trains"
    assert buffer.publish() == 1
    assert buffer.num_free == 2


def test_a_straggler_is_overtaken_until_it_is_due() -> None:
    buffer: WorkBuffer[str] = WorkBuffer(1, 2, last_step=99)
    admit(buffer, 0, 1, 2)
    for step, number in ((1, 1), (2, 2)):
        finish(buffer, number)
        assert numbers(buffer.take()) == [number], "group 0 may still be trained in step 3"
        buffer.publish()
        admit(buffer, number + 2)
        assert buffer.version == step
    finish(buffer, 3)
    assert buffer.take() is None, "group 0 was admitted at version 0: step 3 must train on it"
    finish(buffer, 0)
    assert numbers(buffer.take()) == [0]


def test_extra_groups_are_closed_and_their_late_samples_counted() -> None:
    buffer: WorkBuffer[str] = WorkBuffer(2, 0, last_step=1, num_extra_groups=1)
    admit(buffer, 0, 1, 2)
    finish(buffer, 0, 2)
    buffer.finish(10, "first half of group 1")
    batch = buffer.take()
    assert numbers(batch) == [0, 2]
    assert batch is not None
    assert [group.number for group in batch.closed] == [1]
    assert buffer.finish(11, "too late") is None
    assert (buffer.counts.closed, buffer.counts.late) == (1, 1)
    with pytest.raises(ValueError, match="uid 11 was not admitted"):
        buffer.finish(11, "again")


def test_extra_groups_of_a_synchronous_step_wait_for_its_update() -> None:
    buffer: WorkBuffer[str] = WorkBuffer(2, 0, last_step=9, num_extra_groups=1)
    admit(buffer, 0, 1, 2)
    finish(buffer, 0, 1, 2)
    buffer.take()
    assert buffer.num_free == 0, "a group admitted now would be stale when its step comes"
    buffer.publish()
    assert buffer.num_free == 3


def test_nothing_is_admitted_that_no_step_will_train_on() -> None:
    buffer: WorkBuffer[str] = WorkBuffer(2, 5, last_step=2)
    assert buffer.num_free == 4
    admit(buffer, 0, 1)
    finish(buffer, 0, 1)
    buffer.take()
    assert buffer.num_free == 2


def test_misuse_is_refused() -> None:
    buffer: WorkBuffer[str] = WorkBuffer(1, 1, last_step=9)
    admit(buffer, 3)
    with pytest.raises(ValueError, match="numbers are admitted in order"):
        admit(buffer, 3)
    with pytest.raises(ValueError, match="one that is here already"):
        buffer.admit(4, uids_of(3, 2))
    admit(buffer, 4)
    with pytest.raises(ValueError, match="no slot is free"):
        admit(buffer, 5)
    finish(buffer, 3)
    with pytest.raises(ValueError, match="delivered before"):
        finish(buffer, 3)
    buffer.take()
    with pytest.raises(RuntimeError, match="step 1 is still training"):
        buffer.take()
    with pytest.raises(ValueError, match="allowed: at least 1, 0 and 0"):
        WorkBuffer(0, 0, 1)


class AnyInterleaving(RuleBasedStateMachine):
    """A shadow of the buffer that knows when each group was admitted and what became of it."""

    @initialize(
        per_step=st.integers(1, 3), staleness=st.integers(0, 3), extra=st.integers(0, 2), samples=st.integers(1, 3)
    )
    def start(self, per_step: int, staleness: int, extra: int, samples: int) -> None:
        self.per_step, self.staleness, self.extra, self.samples = per_step, staleness, extra, samples
        self.buffer: WorkBuffer[int] = WorkBuffer(per_step, staleness, last_step=10**6, num_extra_groups=extra)
        self.admitted_at: dict[int, int] = {}
        self.missing: dict[int, set[int]] = {}
        self.fate: dict[int, str] = {}
        self.late: list[int] = []
        self.num_late = 0
        self.training = False

    def here(self) -> list[int]:
        return [number for number in self.admitted_at if number not in self.fate]

    @rule(gap=st.integers(1, 2))
    def admit(self, gap: int) -> None:
        if self.buffer.num_free:
            number = max(self.admitted_at, default=-1) + gap
            self.buffer.admit(number, uids_of(number, self.samples))
            self.admitted_at[number] = self.buffer.version
            self.missing[number] = set(uids_of(number, self.samples))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        waiting = [uid for number in self.here() for uid in sorted(self.missing[number])]
        if waiting:
            uid = data.draw(st.sampled_from(waiting))
            number = uid // 10
            self.missing[number].discard(uid)
            done = self.buffer.finish(uid, uid)
            assert (done is not None) == (not self.missing[number])
            assert done is None or sorted(done.results) == uids_of(number, self.samples)

    @rule(share=st.sampled_from([0.5, 1.0]), newest_first=st.booleans())
    def finish_many(self, share: float, newest_first: bool) -> None:
        """Most steps of a job: whole groups come in, so that many steps are taken in one example."""
        waiting = sorted((n for n in self.here() if self.missing[n]), reverse=newest_first)
        for number in waiting[: round(share * len(waiting))]:
            for uid in sorted(self.missing[number]):
                self.buffer.finish(uid, uid)
            self.missing[number] = set()

    @rule()
    def fill(self) -> None:
        while self.buffer.num_free:
            self.admit(1)

    @rule(data=st.data())
    def late_sample(self, data: st.DataObject) -> None:
        if self.late:
            uid = self.late.pop(data.draw(st.integers(0, len(self.late) - 1)))
            assert self.buffer.finish(uid, uid) is None
            self.num_late += 1

    def leaves(self, number: int, fate: str) -> None:
        assert number not in self.fate, f"group {number} left as {self.fate.get(number)} and again as {fate}"
        self.fate[number] = fate
        self.late += sorted(self.missing[number])

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.here():
            number = data.draw(st.sampled_from(self.here()))
            self.buffer.drop(number, "uniform")
            self.leaves(number, "dropped")

    @precondition(lambda self: not self.training)
    @rule()
    def take(self) -> None:
        batch = self.buffer.take()
        if batch is None:
            return
        assert batch.step == self.buffer.version + 1
        assert len(batch.groups) == self.per_step
        assert len(batch.closed) <= self.extra
        for group in batch.groups:
            assert not self.missing[group.number], "an incomplete group was handed out"
            assert sorted(group.results) == uids_of(group.number, self.samples)
            assert (batch.step - 1) - self.admitted_at[group.number] <= self.staleness
            self.leaves(group.number, "trained")
        for group in batch.closed:
            self.leaves(group.number, "closed")
        self.training = True

    @precondition(lambda self: self.training)
    @rule()
    def publish(self) -> None:
        self.buffer.publish()
        self.training = False

    @invariant()
    def everything_is_counted(self) -> None:
        counts, fates = self.buffer.counts, list(self.fate.values())
        in_training = self.per_step if self.training else 0
        assert counts.admitted == len(self.admitted_at)
        assert counts.trained + in_training == fates.count("trained")
        assert counts.closed == fates.count("closed")
        assert counts.dropped["uniform"] == fates.count("dropped")
        assert counts.late == self.num_late
        assert len(self.buffer.outstanding()) == len(self.here()) + in_training
        assert sorted(self.buffer.in_flight()) == sorted(uid for n in self.here() for uid in self.missing[n])
        assert len(self.buffer.outstanding()) <= self.buffer.capacity

    @precondition(lambda self: not self.training)
    @invariant()
    def it_never_deadlocks(self) -> None:
        """Full and all complete: there is a batch. (`take` is tried last, as it changes the buffer.)"""
        if self.buffer.num_free == 0 and not any(self.missing[number] for number in self.here()):
            self.take()
            assert self.training


AnyInterleaving.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAnyInterleaving = AnyInterleaving.TestCase

"""What the pool knows and decides about its workers, without any: who is hung, who is told what, who builds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.actors import PoolError
from slipstream.rollout.briefing import Briefing
from slipstream.rollout.flight import Flight
from slipstream.rollout.health import MAX_GAP_S, Patience
from slipstream.rollout.learned import Learned
from slipstream.rollout.lengths import LengthModel
from slipstream.rollout.placement import missing
from slipstream.rollout.roster import PoolLimits, Roster, Worker
from slipstream.rollout.sharing import IndexSharing
from slipstream.rollout.types import Request, Sampling

# ---- patience


@given(st.lists(st.floats(0, 50), min_size=1, max_size=30))
def test_silence_counts_only_while_somebody_listens(gaps: list[float]) -> None:
    patience, now = Patience(), 100.0
    assert patience.look(now, heard=False) == 0.0
    for gap in gaps:
        now += gap
        silent = patience.look(now, heard=False)
    assert silent == pytest.approx(sum(min(gap, MAX_GAP_S) for gap in gaps))
    assert patience.look(now + 1e6, heard=True) == 0.0
    assert patience.look(now + 1e6 + 1.0, heard=False) == pytest.approx(1.0)


# ---- roster


def test_restarts_are_counted_and_end() -> None:
    roster = Roster(max_restarts=2)
    worker = Worker(roster.next_number(), None)
    roster.join(worker)
    assert roster.starting() == [worker]
    worker.state = "serving"
    for incarnation in (1, 2):
        assert roster.died(worker, "killed", hung=incarnation == 2)
        assert worker.state == "gone"
        assert roster.serving() == []
        worker = Worker(worker.number, None, incarnation, "serving")
        roster.join(worker)
    with pytest.raises(PoolError) as raised:
        roster.died(worker, "killed", hung=False)
    assert str(raised.value) == (
        "an actor died (rollout worker 0), for the 3. time, cluster.max_worker_restarts=2: killed"
    )
    assert roster.metrics() == {"pool/workers": 0, "pool/deaths": 3, "pool/hung_workers": 1, "pool/restarts": 2}


def test_one_that_leaves_is_not_missed_and_its_number_is_not_used_again() -> None:
    roster = Roster(max_restarts=0)
    first, second = (Worker(roster.next_number(), None, state="serving") for _ in range(2))
    roster.join(first)
    roster.join(second)
    second.state = "leaving"
    assert not roster.died(second, "killed", hung=False)
    assert [worker.name for worker in roster] == ["rollout worker 0"]
    assert roster.next_number() == 2
    assert roster.named("rollout worker 0") is first
    with pytest.raises(PoolError, match=r"allowed: rollout worker 0$"):
        roster.named("rollout worker 1")


# ---- briefing


def records(step: int, num_tokens: int = 4) -> list[HistoryRecord]:
    return [HistoryRecord("p", step, 10 * step + i, np.full(num_tokens, step, np.int32)) for i in range(2)]


def told_to(briefing: Briefing, known: int) -> tuple[list[int], int]:
    """The uids that a newcomer hears until it knows all, and how many publishes it knows then."""
    uids: list[int] = []
    while (told := briefing.next_for(known)) is not None:
        uids += [record.uid for record in told.records]
        known = told.serial
    return uids, known


@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 4))
def test_a_newcomer_hears_every_record_of_the_window_once(before: int, meanwhile: int, window: int) -> None:
    briefing = Briefing(window)
    assert briefing.next_for(0) is None
    for step in range(1, before + 1):
        briefing.everybody_knows()
        briefing.publish(step, records(step), None)
    told = briefing.next_for(0)
    known = told.serial if told else 0
    uids = [record.uid for record in told.records] if told else []
    assert uids == [r.uid for step in range(max(1, before - window + 1), before + 1) for r in records(step)]
    for step in range(before + 1, before + meanwhile + 1):
        briefing.publish(step, records(step), None)
    rest, known = told_to(briefing, known)
    assert known == before + meanwhile
    since = (
        range(before + 1, before + meanwhile + 1) if before else range(max(1, meanwhile - window + 1), meanwhile + 1)
    )
    assert rest == [r.uid for step in since for r in records(step)]


def test_a_newcomer_learns_the_lengths_that_the_others_have_seen() -> None:
    lengths = LengthModel()
    lengths.observe(["p", "q"], [30, 90], [False, False])
    briefing, learned = Briefing(4), Learned(lengths=lengths)
    briefing.publish(1, records(1, 30), learned)
    briefing.publish(2, records(2, 50), learned.without_lengths())
    told = briefing.next_for(0)
    assert told is not None
    assert told.learned is not None
    assert told.learned.lengths is not None
    lengths.observe(["p", "p"], [50, 50], [False, False])
    assert told.learned.lengths.to_arrays() == lengths.to_arrays()
    assert told.learned.acceptance is learned.acceptance


# ---- shared indexes


def serving(*nodes: str) -> list[Worker]:
    return [Worker(i, None, state="serving", node=node) for i, node in enumerate(nodes)]


def test_a_node_has_one_builder_and_a_successor() -> None:
    sharing, workers = IndexSharing(), serving("a", "a", "b", "a", "c", "c")
    assert sharing.elect(workers) == []
    sharing.enabled = True
    assert sharing.elect(workers) == [workers[0], workers[4]]
    assert sharing.elect(workers) == []
    assert sharing.path_for(workers[1]) == ""
    sharing.opened(workers[0], "/a0")
    assert [sharing.path_for(worker) for worker in workers] == ["", "/a0", "", "/a0", "", ""]
    sharing.gone(workers[0])
    assert sharing.elect(workers[1:]) == [workers[1]]
    sharing.opened(workers[1], "/a1")
    assert sharing.path_for(workers[3]) == "/a1"
    # A drafter that has nothing to share ends it for all.
    sharing.opened(workers[4], None)
    sharing.gone(workers[1])
    assert sharing.elect(workers) == []


# ---- requests of a worker that died


def test_a_request_that_workers_die_of_is_found_and_the_others_forgotten() -> None:
    flight = Flight(2, "sample", True, PoolLimits(max_deaths_per_request=2))
    wanted = [Request(uid, "p", 0, np.ones(1, np.int32), Sampling(4)) for uid in (1, 2, 3)]
    flight.submit(wanted, {})
    first, second = serving("a", "a")
    for request in wanted[:2]:
        flight._give(first, request, 1.0)
    flight._waiting.clear()
    assert flight.requeue(first) == 2
    assert [unit.requests[0].uid for unit in flight._waiting] == [1, 2]
    assert flight.requeue(first) == 0
    flight._give(second, wanted[1], 1.0)
    with pytest.raises(PoolError) as raised:
        flight.requeue(second)
    assert str(raised.value) == (
        "uid 2 was held by 2 workers that died (rollout worker 0, rollout worker 1), the last of them held 1 requests; "
        "cluster.max_deaths_per_request=2"
    )
    with pytest.raises(PoolError, match="uid 3 was submitted twice"):
        flight.submit(wanted[2:], {})


def test_what_was_aborted_is_not_begun_again() -> None:
    flight = Flight(2, "sample", True, PoolLimits())
    wanted = [Request(uid, "p", 0, np.ones(1, np.int32), Sampling(4)) for uid in (1, 2, 3)]
    flight.submit(wanted, {})
    [worker] = serving("a")
    flight._waiting.clear()
    for request in wanted:
        flight._give(worker, request, 1.0)
    flight._unwanted = {2}
    assert flight.requeue(worker) == 3
    assert [unit.requests[0].uid for unit in flight._waiting] == [1, 3]
    assert [(r.request.uid, r.finish, len(r.tokens)) for r in flight._aborted] == [(2, "abort", 0)]
    assert flight.num_open == 2


# ---- placement


def node(cpus: float, gpus: float = 0.0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.mark.parametrize(
    ("strategy", "bundles", "nodes", "free", "words"),
    [
        ("pack", [{"CPU": 2.0}] * 4, [node(4), node(4)], {"CPU": 6.0}, "they need 8 CPUs, 6 are free"),
        ("spread", [{"GPU": 1.0}], [node(8)], {"CPU": 8.0}, "they need 1 GPUs, 0 are free; no node has 1 GPUs"),
        (
            "strict_spread",
            [{"CPU": 2.0}] * 3,
            [node(8), node(8), node(1), node(8, alive=False)],
            {"CPU": 17.0},
            "they need 3 nodes, one each, 2 of 3 nodes are large enough",
        ),
        ("pack", [{"CPU": 3.0}] * 2, [node(4), node(2)], {"CPU": 6.0}, "enough is free in total, but not in pieces"),
    ],
)
def test_what_a_placement_lacks_is_said(
    strategy: str, bundles: list[dict], nodes: list[dict], free: dict, words: str
) -> None:
    assert words in missing(strategy, bundles, nodes, free)  # type: ignore[arg-type]

"""Dealing requests to workers: pure functions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.rollout.routing import Dealer, Routing, Unit, longest_first, make_units, preference
from slipstream.rollout.types import Request, Sampling, request_uid

ROUTINGS: tuple[Routing, ...] = ("sample", "group", "prompt")


def requests(num_groups: int, num_samples: int) -> list[Request]:
    sampling = Sampling(8)
    return [
        Request(request_uid(0, 0, g, s), f"p{g}", g, np.array([1], np.int32), sampling)
        for g in range(num_groups)
        for s in range(num_samples)
    ]


def names(num: int) -> list[str]:
    return [f"w{i}" for i in range(num)]


def deal(units: list[Unit], num_workers: int, routing: Routing, max_held: int = 10_000) -> list[str]:
    held, load = dict.fromkeys(names(num_workers), 0), dict.fromkeys(names(num_workers), 0.0)
    return Dealer(routing, max_held).deal(units, held, load)


@given(st.integers(1, 12), st.integers(1, 9), st.sampled_from(ROUTINGS), st.integers(1, 12))
def test_units_hold_every_request_once_and_in_order(
    num_groups: int, num_samples: int, routing: Routing, most: int
) -> None:
    wanted = requests(num_groups, num_samples)
    units = make_units(wanted, {"p0": 50.0, "p1": 10.0}, routing, most)
    assert [r.uid for unit in units for r in unit.requests] == [r.uid for r in wanted]
    assert max(len(unit.requests) for unit in units) == (1 if routing == "sample" else min(most, num_samples))
    assert all(len({r.group for r in unit.requests}) == 1 for unit in units)
    expected = {"p0": 50.0, "p1": 10.0}
    assert all(unit.tokens == expected.get(unit.requests[0].prompt_id, 30.0) for unit in units)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(1, 1e4)), max_size=30),
    st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1e5)), min_size=1, max_size=6),
    st.integers(4, 12),
    st.sampled_from(ROUTINGS),
)
def test_nobody_gets_more_than_it_may_hold_and_the_line_keeps_its_order(
    sizes: list[tuple[int, float]], workers: list[tuple[int, float]], max_held: int, routing: Routing
) -> None:
    units = [Unit(tuple(requests(1, size)), tokens) for size, tokens in sizes]
    held = {name: count for name, (count, _) in zip(names(len(workers)), workers, strict=True)}
    load = {name: tokens for name, (_, tokens) in zip(names(len(workers)), workers, strict=True)}
    dealer = Dealer(routing, max_held)
    takers = dealer.deal(units, held, load)
    assert takers == dealer.deal(units, held, load)
    after = dict(held)
    for unit, taker in zip(units, takers, strict=False):
        after[taker] += len(unit.requests)
        assert after[taker] <= max_held
    if len(takers) < len(units):
        # The first that was left fits nowhere.
        assert min(after.values()) + len(units[len(takers)].requests) > max_held


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=40), st.integers(1, 8), st.floats(1.01, 4))
def test_affinity_is_bounded_by_load(tokens: list[float], num_workers: int, limit: float) -> None:
    """Bounded loads: nobody is above limit times the mean by more than the one unit it took last."""
    units = [Unit(tuple(requests(i + 1, 1)[-1:]), n) for i, n in enumerate(tokens)]
    empty = dict.fromkeys(names(num_workers), 0.0)
    takers = Dealer("prompt", 10_000, limit).deal(units, dict.fromkeys(empty, 0), empty)
    load = dict(empty)
    for unit, taker in zip(units, takers, strict=True):
        mean = (sum(load.values()) + unit.load) / num_workers
        assert load[taker] <= limit * mean * (1 + 1e-9)
        # And no worker that the prompt prefers was free to take it.
        order = preference(unit.requests[0].prompt_id, empty)
        assert all(load[name] > limit * mean * (1 - 1e-9) for name in order[: order.index(taker)])
        load[taker] += unit.load


def test_a_prompt_stays_where_it_was_and_few_move_when_a_worker_goes() -> None:
    five = {f"p{i}": preference(f"p{i}", names(5))[0] for i in range(1000)}
    four = {f"p{i}": preference(f"p{i}", names(4))[0] for i in range(1000)}
    assert all(four[prompt] == home for prompt, home in five.items() if home != "w4")
    counts = Counter(five.values())
    assert min(counts.values()) > 150
    assert preference("p1", names(5)) == preference("p1", reversed(names(5)))
    # Twice the same requests, other loads: the same workers, as long as the bound allows.
    units = make_units(requests(8, 2), {}, "prompt", 8)
    idle, busy = dict.fromkeys(names(3), 100.0), {"w0": 102.0, "w1": 100.0, "w2": 101.0}
    held = dict.fromkeys(names(3), 0)
    dealer = Dealer("prompt", 100, 1.25)
    assert dealer.deal(units, held, idle) == dealer.deal(units, held, busy)
    overloaded = dealer.deal(units, held, busy | {"w1": 400.0})
    assert "w1" not in overloaded


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 9))
def test_single_samples_share_the_workers(num_groups: int, num_workers: int, num_samples: int) -> None:
    wanted = requests(num_groups, num_samples)
    takers = Counter(deal(make_units(wanted, {}, "sample", 9), num_workers, "sample"))
    assert sum(takers.values()) == len(wanted)
    counts = [takers[name] for name in names(num_workers)]
    assert max(counts) - min(counts) <= 1


def test_the_longest_go_first_and_to_different_workers() -> None:
    predicted = {"p0": 10.0, "p1": 500.0, "p2": 480.0, "p3": 20.0}
    units = longest_first(make_units(requests(4, 2), predicted, "group", 8))
    assert [unit.requests[0].prompt_id for unit in units] == ["p1", "p2", "p3", "p0"]
    assert deal(units, 2, "group") == ["w0", "w1", "w1", "w0"]
    spread = longest_first(make_units(requests(3, 4), {"p0": 10.0, "p1": 400.0, "p2": 10.0}, "sample", 8))
    assert deal(spread, 2, "sample")[:4] == ["w0", "w1", "w0", "w1"]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_nothing_is_dealt_to_the_full(routing: Routing) -> None:
    units = make_units(requests(2, 1), {}, routing, 1)
    assert Dealer(routing, 2).deal(units, {"w0": 2, "w1": 1}, {"w0": 0.0, "w1": 900.0}) == ["w1"]

"""Dealing groups to workers: a pure function."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slipstream.rollout.pool import assign_requests
from slipstream.rollout.types import Request, Sampling, request_uid


def requests(num_groups: int, num_samples: int) -> list[Request]:
    sampling = Sampling(8)
    return [
        Request(request_uid(0, 0, g, s), f"p{g}", g, np.array([1], np.int32), sampling)
        for g in range(num_groups)
        for s in range(num_samples)
    ]


@given(st.lists(st.floats(1, 1e4), max_size=12), st.integers(1, 6), st.integers(1, 4))
def test_groups_stay_whole_and_nothing_is_lost(lengths: list[float], num_workers: int, num_samples: int) -> None:
    wanted = requests(len(lengths) + 2, num_samples)
    predicted = {f"p{i}": length for i, length in enumerate(lengths)}
    dealt = assign_requests(wanted, predicted, num_workers, "group")
    assert len(dealt) == num_workers
    assert sorted(r.uid for share in dealt for r in share) == sorted(r.uid for r in wanted)
    homes = [{r.group for r in share} for share in dealt]
    assert sum(len(groups) for groups in homes) == len(lengths) + 2
    assert dealt == assign_requests(wanted, predicted, num_workers, "group")


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 9))
def test_single_samples_share_the_workers(num_groups: int, num_workers: int, num_samples: int) -> None:
    wanted = requests(num_groups, num_samples)
    dealt = assign_requests(wanted, {}, num_workers, "sample")
    assert sorted(r.uid for share in dealt for r in share) == sorted(r.uid for r in wanted)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_a_long_prompts_samples_are_spread() -> None:
    dealt = assign_requests(requests(3, 4), {"p0": 10.0, "p1": 400.0, "p2": 10.0}, 2, "sample")
    assert [sum(r.prompt_id == "p1" for r in share) for share in dealt] == [2, 2]
    assert dealt[0][0].prompt_id == dealt[1][0].prompt_id == "p1"


def test_the_longest_go_first_and_to_different_workers() -> None:
    predicted = {"p0": 10.0, "p1": 500.0, "p2": 480.0, "p3": 20.0}
    dealt = assign_requests(requests(4, 2), predicted, 2, "group")
    assert [share[0].prompt_id for share in dealt] == ["p1", "p2"]
    assert {r.prompt_id for r in dealt[1]} == {"p2", "p3"}

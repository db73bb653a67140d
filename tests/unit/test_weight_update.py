"""Who verifies what, and who may vouch for whom; what an update's metrics count."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.conf.schema import Settings
from slipstream.rollout.actors import PoolError
from slipstream.rollout.weight_handle import Frame, Layout, Share, TensorSpec, WeightHandle
from slipstream.rollout.weight_receiver import Receipt, unverified
from slipstream.rollout.weight_store import StorePayload
from slipstream.rollout.weight_update import WeightUpdate, check_served, deal_shares


def receipt(node: str, share: Share, num_frames: int = 1, num_bytes: int = 100) -> Receipt:
    return Receipt(node, 7, num_frames, num_bytes, num_frames > 1, share, 0.5)


def handle(num_frames: int = 1) -> WeightHandle:
    layout = Layout((TensorSpec("policy", "a", "float32", (50,), 200),), 64)
    frames = [Frame(v, None, np.zeros(4, np.uint64), 0, 100, StorePayload(None)) for v in range(8 - num_frames, 8)]
    return WeightHandle(layout, tuple(frames))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.none() | st.integers(1, 4))
def test_shares_cover_every_node_once(nodes: list[str], most: int | None) -> None:
    shares = [share.within(most) for share in deal_shares(nodes)]
    assert max(Counter(node for node, share in zip(nodes, shares, strict=True) if share.of).values()) <= (most or 9)
    for node in set(nodes):
        mine = [share for share, other in zip(shares, nodes, strict=True) if other == node]
        blocks = [i for share in mine for i in range(*share.limits(101))]
        assert sorted(blocks) == list(range(101))
    assert unverified([receipt(node, share) for node, share in zip(nodes, shares, strict=True)]) == []


def test_nobody_vouches_for_what_nobody_looked_at() -> None:
    half = [Share(0, 2), Share(1, 2)]
    assert unverified([receipt("a", half[0]), receipt("b", half[1])]) == [0, 1], "one of them has moved"
    assert unverified([receipt("a", half[0]), receipt("a", half[0])]) == [0, 1]
    assert unverified([receipt("a", half[0], 1), receipt("a", half[1], 3)]) == [0, 1], "other frames were fetched"
    assert unverified([receipt("a", Share()), receipt("a", half[1], 3)]) == [1]
    assert unverified([receipt("a", Share()), receipt("a", Share())]) == []
    assert unverified([receipt("a", Share()), receipt("a", Share(0, 0))]) == []
    assert unverified([receipt("a", Share()), receipt("b", Share(0, 0))]) == [1], "the reader was on another node"
    assert unverified([receipt("a", half[0]), receipt("a", Share(0, 0))]) == [0, 1], "the other reader has died"


def test_metrics_count_a_nodes_fetch_once() -> None:
    receipts = [receipt("a", Share()), receipt("a", Share(), 2, 300), receipt("b", Share())]
    metrics = WeightUpdate(handle(), dict(enumerate(receipts))).metrics()
    assert metrics == {
        "weights/bytes_full": 200,
        "weights/bytes_sent": 100,
        "weights/bytes_fetched": 400,
        "weights/whole_transfers": 1,
        "weights/prepare_s": 0.5,
    }


def test_a_worker_that_serves_something_else_is_an_error() -> None:
    check_served({"a": 7, "b": 7}, handle())
    with pytest.raises(PoolError, match="b serves 6, expected version 7"):
        check_served({"a": 7, "b": 6}, handle())


def test_blocks_belong_to_tensors() -> None:
    specs = [TensorSpec("policy", name, "uint8", (n,), n) for name, n in (("a", 130), ("b", 0), ("c", 64))]
    layout = Layout(tuple(specs), 64)
    assert layout.offsets.tolist() == [0, 3, 3, 4]
    assert [part.tolist() for part in layout.split(np.array([0, 2, 3]))] == [[0, 2], [], [0]]
    assert [layout.sent_bytes(0, np.array(numbers)) for numbers in ([], [0], [0, 2], [2])] == [0, 64, 66, 2]
    assert specs[0].view(torch.zeros(130, dtype=torch.uint8)).shape == (130,)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for keys, said in (
        ({"delta": True, "verify": False}, "need weights.verify=true"),
        ({"folder": "/shared"}, "allowed: weights.transport=disk"),
        ({"block_bytes": 100}, "multiple of 64"),
    ):
        with pytest.raises(ValueError, match=said):
            Settings.model_validate({"weights": keys})

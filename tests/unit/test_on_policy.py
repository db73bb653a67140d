"""A synchronous step trains on rollouts of its own version only."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.rollout.actors import PoolError
from slipstream.rollout.types import Request, Rollout, Sampling
from slipstream.trainer.rollout_source import check_on_policy


def rollout(uid: int, versions: list[int]) -> Rollout:
    tokens = np.arange(len(versions), dtype=np.int32)
    request = Request(uid, "p", 0, np.arange(3, dtype=np.int32), Sampling(8))
    return Rollout(request, tokens, np.zeros(len(tokens), np.float32), np.array(versions, np.int32), "length")


def test_one_stale_token_is_named() -> None:
    check_on_policy([rollout(1, [4, 4]), rollout(2, [])], 4)
    with pytest.raises(PoolError, match=r"1 rollouts hold tokens of another version than 4, .* \(uid 2\) of \[3, 4\]"):
        check_on_policy([rollout(1, [4, 4]), rollout(2, [3, 4])], 4)

"""Who may be in one pool."""

from __future__ import annotations

import pytest

from slipstream.rollout.actors import PoolError
from slipstream.rollout.roster import Worker, check_alike


def worker(number: int, products: str | None) -> Worker:
    return Worker(number, None, facts={} if products is None else {"products": products})


def test_workers_of_one_pool_multiply_alike() -> None:
    """Or a request that goes to another worker would get other tokens."""
    starting = worker(3, None)  # has not said yet
    check_alike(worker(0, "tiles"), [worker(0, "tiles"), worker(1, "tiles"), starting])
    check_alike(worker(0, "fma"), [])
    with pytest.raises(PoolError) as error:
        check_alike(worker(2, "fma"), [starting, worker(1, "tiles")])
    assert str(error.value) == (
        "rollout worker 2 multiplies by fma, rollout worker 1 by tiles, and a request would get other tokens from "
        "each; allowed: one for all, as engine.cpu_products=fma makes sure"
    )

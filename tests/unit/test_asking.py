"""A drafter is asked where its drafts are worth its time."""

from __future__ import annotations

import time

import numpy as np

from slipstream.drafter.base import DraftBatch, LiveBatch, Price
from slipstream.drafter.ngram import NgramDrafter
from slipstream.rollout.asking import MIN_SEEN, PROBE_EVERY, Asking
from slipstream.rollout.budget import PriceBudget
from slipstream.rollout.cost_model import CostModel
from slipstream.rollout.pricing import Pricing
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Sampling
from tests.tiny_models import tiny_model


def test_what_costs_more_than_it_saves_is_probed_only() -> None:
    asking = Asking()
    for _ in range(MIN_SEEN):
        assert asking.pays(8)
        asking.observe(1e-5, 2e-5)
    asked = [asking.pays(8) for _ in range(4 * PROBE_EVERY)]
    assert sum(asked) == 4
    assert asking.num_skipped == 4 * PROBE_EVERY - 4
    for _ in range(MIN_SEEN):
        asking.observe(9e-5, 2e-5)
    assert all(asking.pays(8) for _ in range(2 * PROBE_EVERY))


def test_a_smaller_batch_begins_anew() -> None:
    asking = Asking()
    asking.pays(8)
    for _ in range(MIN_SEEN):
        asking.observe(0.0, 1.0)
    assert not asking.pays(5)
    assert asking.pays(4)
    for _ in range(MIN_SEEN):
        asking.observe(0.0, 1.0)
    assert not asking.pays(4)
    assert asking.pays(8)


class SlowAndWrong(NgramDrafter):
    """Takes its time, and is never right."""

    calls = 0

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        self.calls += 1
        time.sleep(0.003)
        out.count[: len(batch)] = np.minimum(price.max_draft, 1)
        out.tokens[: len(batch), 0] = 1
        out.source[: len(batch)] = 1


def test_an_engine_asks_such_a_drafter_seldom() -> None:
    drafter, prompt = SlowAndWrong(), np.arange(3, 12, dtype=np.int32)
    requests = [Request(uid, "p", uid, prompt, Sampling(120, temperature=0.7, seed=3)) for uid in range(4)]
    cost = CostModel()
    for live, tokens in ((4, 4), (4, 8), (8, 8), (8, 30), (2, 2), (1, 9)) * 20:
        cost.observe(live, 50 * live, tokens, 1e-3 + 2e-5 * tokens)
    cost.fit()
    assert cost.trusted
    pricing = Pricing(8, cost)
    engine = TorchEngine(
        tiny_model("qwen3"), max_live_requests=8, drafter=drafter, budget=PriceBudget(8), pricing=pricing
    )
    engine.submit(requests)
    assert len(engine.drain(60)) == 4
    assert pricing.asking.num_skipped == pricing.metrics()["das/steps_not_asked"] > 0
    assert drafter.calls < engine.stats().steps / 2

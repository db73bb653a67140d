"""The engine feeds what prices are made of, and a worker carries it from step to step."""

from __future__ import annotations

import dataclasses

import numpy as np

from slipstream.drafter.base import HistoryRecord, LiveBatch, Price
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.rollout.acceptance import CURVE_PRIOR_TOKENS, AcceptanceModel
from slipstream.rollout.budget import FixedBudget, PriceBudget
from slipstream.rollout.cost_model import CostModel
from slipstream.rollout.guard import Guard
from slipstream.rollout.learned import Learned, Observed, observe_records
from slipstream.rollout.lengths import LengthModel, LiveLengths
from slipstream.rollout.pricing import PRICE_EVERY, Pricing
from slipstream.rollout.slots import SlotTable
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid
from tests.tiny_models import tiny_model


def requests(count: int = 6, max_new_tokens: int = 40) -> list[Request]:
    prompt = np.arange(3, 12, dtype=np.int32)
    sampling = Sampling(max_new_tokens, temperature=0.7, seed=3, stop_token_ids=(2,))
    return [Request(request_uid(0, 0, i % 2, i), f"p{i % 2}", i % 2, prompt + i % 2, sampling) for i in range(count)]


def run(engine: TorchEngine) -> list[Rollout]:
    engine.submit(requests())
    return sorted(engine.drain(60), key=lambda rollout: rollout.request.uid)


def records(rollouts: list[Rollout]) -> list[HistoryRecord]:
    return [
        HistoryRecord(r.request.prompt_id, 1, r.request.uid, r.tokens, censored=r.finish == "length") for r in rollouts
    ]


def engine_with(pricing: Pricing, budget: object, history: list[HistoryRecord]) -> TorchEngine:
    drafter = SuffixDrafter()
    drafter.publish(1, history)
    drafter.wait()
    return TorchEngine(tiny_model("qwen3"), max_live_requests=8, drafter=drafter, budget=budget, pricing=pricing)


def test_every_step_is_a_measurement_and_every_batch_settles_who_was_last() -> None:
    plain = TorchEngine(tiny_model("qwen3"), max_live_requests=8)
    known = records(run(plain))
    assert plain.pricing.cost.totals[4] == plain.stats().steps > 10
    pricing = Pricing(8)
    lengths = LengthModel()
    observe_records(lengths, known)
    pricing.learn_lengths(lengths)
    engine = engine_with(pricing, PriceBudget(16), known)
    again = run(engine)
    for mine, text in zip(again, sorted(known, key=lambda record: record.uid), strict=True):
        np.testing.assert_array_equal(mine.tokens, text.tokens)
    assert engine.stats().accepted > 0
    assert pricing.cost.totals[4] == engine.stats().steps
    assert pricing.metrics()["das/last_brier"] >= 0.0


class CountingBudget(PriceBudget):
    """Prices as its base does, and remembers for how many requests."""

    def __init__(self) -> None:
        super().__init__(16)
        self.priced: list[int] = []

    def price(self, live: LiveBatch, cost: CostModel | None = None, lengths: LiveLengths | None = None) -> Price:
        """See PriceBudget."""
        self.priced.append(len(live))
        return super().price(live, cost, lengths)


def test_a_price_stays_while_requests_only_leave_and_most_are_there() -> None:
    pricing, budget, table = Pricing(8), CountingBudget(), SlotTable(8, 64)
    for request in requests(8):
        table.admit(request, table.take())

    def price() -> Price:
        return pricing.price(budget, table.live_batch(table.order), table, 0, AcceptanceModel())

    first = price()
    table.retire(2, "stop")
    table.retire(6, "stop")
    second = price()
    assert budget.priced == [8]
    stayed = [0, 2, 3, 4, 6, 7]  # slots are given out from the last one down: rows 1 and 5 have left
    np.testing.assert_array_equal(second.min_accept_prob, first.min_accept_prob[stayed])
    np.testing.assert_array_equal(second.max_draft, first.max_draft[stayed])
    assert abs(pricing._chances.sum() - 1.0) < 1e-9
    table.retire(0, "stop")
    assert len(price().max_draft) == 5
    assert budget.priced == [8, 5]
    # Another request in the place of one that left is no old acquaintance.
    table.retire(4, "stop")
    table.admit(requests(9)[-1], 4)
    assert len(price().max_draft) == 5
    assert budget.priced == [8, 5, 5]
    for _ in range(PRICE_EVERY):
        price()
    assert budget.priced == [8, 5, 5, 5]


def test_the_guard_holds_steps_out_and_stops_what_it_must_not_allow() -> None:
    plain = run(TorchEngine(tiny_model("qwen3"), max_live_requests=8))
    guard = Guard()
    guard.speculating = False
    engine = engine_with(Pricing(8, guard=guard), FixedBudget(4), records(plain))
    assert [r.tokens.tolist() for r in run(engine)] == [r.tokens.tolist() for r in plain]
    assert engine.stats().drafted == 0
    guard = Guard()
    engine = engine_with(Pricing(8, guard=guard), FixedBudget(4), records(plain))
    for _ in range(12):
        run(engine)
    assert guard.num_held_out >= 1
    assert engine.stats().drafted > 0


def test_the_budget_asks_for_probabilities_and_the_drafter_is_asked_for_its_estimates() -> None:
    model = AcceptanceModel()
    np.testing.assert_allclose(model.estimates_for(np.array([0.0, 0.3, 0.9, 1.0])), [0, 0.3, 0.9, 1.0], atol=1e-6)
    # Tokens estimated at a quarter are accepted one time in ten.
    model.curve[:, 2] = [1e6, 0.25e6, 0.1e6]
    model.curve[:, :2] = [[1e6, 1e6], [0.05e6, 0.15e6], [0.01e6, 0.04e6]]
    assert abs(model.estimates_for(np.array([0.1]))[0] - 0.25) < 0.01
    assert model.estimates_for(np.array([0.06]))[0] > 0.15
    assert CURVE_PRIOR_TOKENS > 0


def test_what_was_learned_survives_a_checkpoint() -> None:
    engine = TorchEngine(tiny_model("qwen3"), max_live_requests=8)
    known = records(run(engine))
    learned = Learned()
    assert learned.lengths is not None
    observe_records(learned.lengths, known)
    guards = [Guard().state(), dataclasses.replace(Guard().state(), speculating=False, waited=7)]
    learned.observe([Observed(AcceptanceModel(), engine.pricing.cost.copy(), {}, guard) for guard in guards])
    again = Learned.from_arrays(learned.to_arrays())
    assert again.to_arrays() == learned.to_arrays()
    assert again.lengths is not None
    assert again.lengths.num_observed("p0") == 3
    assert again.guards == guards
    assert learned.without_lengths().lengths is None
    assert learned.without_lengths().guards == []

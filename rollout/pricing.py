"""What an engine knows about lengths, costs and gains, and how a step's price comes of it.

Invariants: the engine calls `price` before it drafts and `account` after every step, and nothing else; nothing here
changes a token; per step the work is on arrays, per request only when it joins.
"""

from __future__ import annotations

import numpy as np

from slipstream.drafter.base import LiveBatch, Price
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.budget import BudgetPolicy, PriceBudget
from slipstream.rollout.cost_model import CostModel
from slipstream.rollout.finish_last import LastCalibration
from slipstream.rollout.guard import Guard
from slipstream.rollout.lengths import NUM_BINS, UNKNOWN, LengthModel, LiveLengths
from slipstream.rollout.packing import StepPlan
from slipstream.rollout.price_rows import round_rates, still_there
from slipstream.rollout.slots import SlotTable

PRICE_EVERY = 8
"""Steps that a batch which nobody joins keeps its price for: responses grow by a few tokens meanwhile."""
LEAST_LEFT = 0.75
"""Share of the requests priced that must still be live: fewer are worth another price."""
NOTE_EVERY = 32
"""Steps between two estimates of P(last) that are kept for comparison with who was last."""
PRIOR_ROUNDS = 8.0
FADE_PER_STEP = 0.98
"""Of the tokens drafted and accepted per round over all requests, which a new request is taken to have."""


class Pricing:
    """cost: fitted to every step; lengths: learned from finished rollouts at each step boundary; guard: or None."""

    def __init__(
        self,
        num_slots: int,
        cost: CostModel | None = None,
        lengths: LengthModel | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.cost = CostModel() if cost is None else cost
        self.guard = guard
        self.calibration = LastCalibration()
        self._tables = np.zeros((num_slots, NUM_BINS + 1), np.float32)
        self._initial = np.full(num_slots, UNKNOWN)
        self._uid = np.full(num_slots, -1, np.int64)
        self._steps = self._note_at = 0
        self._measured = False
        self._drafted = self._accepted = 0.0
        self._live: LiveBatch | None = None
        self._budget: BudgetPolicy | None = None
        self._price, self._age = Price(np.zeros(0, np.int32), np.zeros(0, np.float32)), 0
        self._slots, self._num_priced = np.zeros(0, np.int64), 0
        self._chances = np.zeros(0)
        self.learn_lengths(LengthModel() if lengths is None else lengths)

    def learn_lengths(self, lengths: LengthModel) -> None:
        """Takes another model, or the same after it has observed."""
        self.lengths = lengths
        self._uid[:] = -1

    def price(
        self, budget: BudgetPolicy, live: LiveBatch, table: SlotTable, num_queued: int, acceptance: AcceptanceModel
    ) -> Price:
        """The budget's price for the slots of table.order, or zero where the guard forbids.

        The budget asks for probabilities; `acceptance` tells which of the drafter's estimates come to that.
        """
        slots = table.order
        self._age += 1
        if self._budget is not budget or self._age >= PRICE_EVERY or not self._keep(live, table):
            self._price, self._age = self._new_price(budget, live, table, num_queued, acceptance), 0
            self._budget, self._num_priced = budget, len(slots)
        self._slots = slots
        self._live, price = live, self._price
        if self.guard is None or not (price.max_draft > 0).any():
            self._measured = False
            return price
        # The guard leaves steps with prompt tokens alone: they would be noise.
        self._measured = not (table.length[slots] - table.cached[slots] > 1).any()
        if self.guard.allows() if self._measured else self.guard.speculating:
            return price
        return Price(np.zeros_like(price.max_draft), price.min_accept_prob)

    def _keep(self, live: LiveBatch, table: SlotTable) -> bool:
        """Whether the price is still about these requests: all of them were priced, and most are still there. Those
        that have left go from it."""
        before, slots, known = self._live, table.order, self._slots
        if slots is known and before is not None:
            # The table makes another array when somebody joins or leaves.
            return True
        if before is None or not LEAST_LEFT * self._num_priced <= len(slots) <= len(known):
            return False
        # The order of admission never changes.
        stayed = still_there(before.uids, live.uids)
        if stayed is None:
            return False
        if len(slots) == len(known):
            return True
        price, chances = self._price, self._chances[stayed]
        branching = None if price.branching is None else price.branching[stayed]
        self._price = Price(price.max_draft[stayed], price.min_accept_prob[stayed], branching)
        self._chances = chances / chances.sum() if chances.sum() > 0.0 else np.full(len(slots), 1.0 / len(slots))
        return True

    def _new_price(
        self, budget: BudgetPolicy, live: LiveBatch, table: SlotTable, num_queued: int, acceptance: AcceptanceModel
    ) -> Price:
        slots = table.order
        self._join(slots, live.uids, table)
        speed, width = round_rates(table, slots, PRIOR_ROUNDS, self._drafted, self._accepted)
        initial, queued = self._initial[slots], float(num_queued)
        view = LiveLengths(self.lengths, self._tables, slots, initial, speed, queued, width=width, measured=True)
        asked = budget.price(live, self.cost, view)
        rows, is_price = len(slots), isinstance(budget, PriceBudget)
        self._chances = budget.last_chances if isinstance(budget, PriceBudget) else np.full(rows, 1.0 / max(rows, 1))
        if is_price and rows > 1 and not num_queued and self._steps >= self._note_at:
            self.calibration.note(live.uids, self._chances)
            self._note_at = self._steps + NOTE_EVERY
        return Price(asked.max_draft, acceptance.estimates_for(asked.min_accept_prob), asked.branching)

    def _join(self, slots: np.ndarray, uids: np.ndarray, table: SlotTable) -> None:
        for i in np.flatnonzero(self._uid[slots] != uids):
            request = table.requests[slots[i]]
            if request is not None:
                self._tables[slots[i]] = self.lengths.table(request.prompt_id)
                self._initial[slots[i]] = self.lengths.initial_class(request.prompt_id)
                self._uid[slots[i]] = uids[i]

    def account(
        self,
        budget: BudgetPolicy | None,
        table: SlotTable,
        plan: StepPlan,
        counts: np.ndarray,
        num_accepted: int,
        seconds: float,
    ) -> None:
        """A step is done and its finished requests have left. counts: [R'] tokens gained by plan.sampling_slots;
        num_accepted: draft tokens among them."""
        self._steps += 1
        self.cost.observe(len(plan.live_slots), plan.num_cached, len(plan.token_ids), seconds)
        if budget is None or self._live is None:
            return
        budget.observe(plan.draft_counts, np.maximum(counts - 1, 0))
        if len(counts):
            self._drafted += (1.0 - FADE_PER_STEP) * (plan.num_drafted / len(counts) - self._drafted)
            self._accepted += (1.0 - FADE_PER_STEP) * (num_accepted / len(counts) - self._accepted)
        if self._measured and self.guard is not None:
            self.guard.observe(seconds, float(self._chances[plan.draft_rows] @ counts))
        if not len(table.order):
            self.calibration.settle(self._live.uids)
            self._live, self._note_at = None, 0

    def metrics(self) -> dict[str, float]:
        """Everything measured so far, under das/."""
        guard = {} if self.guard is None else self.guard.metrics()
        return self.cost.metrics() | self.calibration.metrics() | guard

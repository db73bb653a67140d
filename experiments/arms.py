"""The budget policies that benches compare, as every one of them is meant to be used.

Invariant: a fresh policy object for every run; `off` is the first arm.
"""

from __future__ import annotations

from collections.abc import Callable

from slipstream.rollout.budget import BudgetPolicy, FixedBudget, OffBudget, PriceBudget
from slipstream.rollout.class_budget import ClassBudget
from slipstream.rollout.closed_form import ClosedFormBudget

MAX_DRAFT_TOKENS = 32

ARMS: dict[str, Callable[[], BudgetPolicy]] = {
    "off": OffBudget,
    "fixed_4": lambda: FixedBudget(4),
    "fixed_16": lambda: FixedBudget(16),
    "unlimited": lambda: FixedBudget(MAX_DRAFT_TOKENS),
    "class": ClassBudget,
    "closed_form_published": lambda: ClosedFormBudget(MAX_DRAFT_TOKENS, "published"),
    "closed_form": lambda: ClosedFormBudget(MAX_DRAFT_TOKENS, "corrected"),
    "price": lambda: PriceBudget(MAX_DRAFT_TOKENS),
}

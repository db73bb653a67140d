"""Generated traces on many workers: what every policy costs and saves, by the cost model.

Invariant: all policies replay the same requests; a policy never sees a length that it could not know.
"""

from __future__ import annotations

import time
from typing import Any

from slipstream.experiments.arms import ARMS, MAX_DRAFT_TOKENS
from slipstream.rollout.cost_model import StepCost
from slipstream.rollout.replay import Trace, replay

MAX_CLOSED_FORM_WORKERS = 64
"""The closed form is solved worker by worker; beyond this it would be most of the bench's time."""


def compare(trace: Trace, cost: StepCost, num_workers: int, max_live: int) -> dict[str, dict[str, float]]:
    """Makespan, share of `off`'s, passes, draft tokens and CPU seconds of every policy."""
    out: dict[str, dict[str, float]] = {}
    for name, make in ARMS.items():
        if name.startswith("closed_form") and num_workers > MAX_CLOSED_FORM_WORKERS:
            continue
        started = time.perf_counter()
        result = replay(
            trace, cost, make(), num_workers=num_workers, max_live=max_live, max_draft_tokens=MAX_DRAFT_TOKENS
        )
        seconds = time.perf_counter() - started
        off = out["off"]["makespan_s"] if out else result.makespan_s
        out[name] = {
            "makespan_s": result.makespan_s,
            "of_off": result.makespan_s / off,
            "rounds": result.rounds,
            "drafted": result.drafted,
            "accepted": result.accepted,
            "cpu_s": seconds,
        }
    return out


def price_vs_best(arms: dict[str, dict[str, float]]) -> float:
    """The price's makespan over the lowest of all."""
    return arms["price"]["makespan_s"] / min(arm["makespan_s"] for arm in arms.values())


def describe(trace: Trace, cost: StepCost, num_workers: int, max_live: int) -> dict[str, Any]:
    """Every assumption of a replay, for the reader."""
    kinds = list(zip(trace.accept.mean(axis=0).tolist(), trace.share.tolist(), strict=True))
    return {
        "num_workers": num_workers,
        "num_requests": len(trace.length),
        "max_live": max_live,
        "length_mean": float(trace.length.mean()),
        "length_max": int(trace.length.max()),
        "share_at_cap": float((trace.length >= trace.cap_tokens).mean()),
        "cap_tokens": trace.cap_tokens,
        "earlier_responses_per_prompt": len(trace.history[0]) if trace.history else 0,
        "context_kinds": [f"{share:.0%} accept {accept:.2f}" for accept, share in kinds],
        "cost_base_ms": 1e3 * cost.base,
        "cost_live_us": 1e6 * cost.live,
        "cost_tok_us": 1e6 * cost.tok,
    }

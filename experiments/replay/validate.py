"""How far the replay's predictions are from what the engine really takes.

Invariants: costs are fitted on the other seeds' runs, at least one; the replay sees the recorded tokens, the cost and
what the engine's drafter would have seen, and no measured time of what it predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.arms import ARMS, MAX_DRAFT_TOKENS
from slipstream.experiments.long_tail.real import Arms, Epoch, Setting, as_records
from slipstream.experiments.replay.tokens import TokenReplay, replay_tokens
from slipstream.experiments.workload import Workload
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.cost_model import CostModel, StepCost
from slipstream.rollout.learned import observe_records
from slipstream.rollout.lengths import LengthModel

VALIDATED = ("off", "fixed_4", "price")


def validate(workload: Workload, setting: Setting, seeds: Sequence[int], num_rounds: int) -> dict[str, Any]:
    """Predicted and measured seconds of the quickstart's warm epochs, and their relative difference, by arm.

    seeds: two or more.
    """
    arms = Arms(workload, setting, VALIDATED)
    prompts = {prompt.prompt_id: prompt.tokens for prompt in workload.prompts.train}
    arms.round(arms.epoch(1000, 3))
    epochs, texts, costs = [], [], []
    measured = dict.fromkeys(VALIDATED, 0.0)
    for seed in seeds:
        epoch = arms.epoch(seed, 3)
        before = [arms.jobs[name].pricing.cost.copy() for name in VALIDATED]
        rounds = [arms.round(epoch, first) for first in range(num_rounds)]
        costs.append([arms.jobs[n].pricing.cost.minus(one) for n, one in zip(VALIDATED, before, strict=True)])
        epochs.append(epoch)
        texts.append([as_records(rounds[0]["off"].rollouts[i : i + setting.num_live], 1) for i in _starts(setting)])
        for name in VALIDATED:
            measured[name] += float(np.median([runs[name].makespan_s for runs in rounds]))
    predicted = dict.fromkeys(VALIDATED, 0.0)
    for left_out, (epoch, batches) in enumerate(zip(epochs, texts, strict=True)):
        fitted = CostModel()
        for model in [one for i, models in enumerate(costs) if i != left_out for one in models]:
            fitted.add(model)
        for name in VALIDATED:
            acceptance = arms.jobs[name].acceptance.copy()
            replays = replay_epoch(name, epoch, batches, prompts, fitted.cost, setting, acceptance)
            predicted[name] += sum(one.makespan_s for one in replays)
    errors = {name: predicted[name] / measured[name] - 1.0 for name in VALIDATED}
    return {
        "predicted_s": predicted,
        "measured_s": measured,
        "relative_error": errors,
        "worst_relative_error": max(map(abs, errors.values())),
        "fitted_on_steps": float(fitted.totals[4]),
        "fitted": {
            "base_ms": 1e3 * fitted.cost.base,
            "live_us": 1e6 * fitted.cost.live,
            "tok_us": 1e6 * fitted.cost.tok,
        },
    }


def _starts(setting: Setting) -> range:
    return range(0, setting.num_batches * setting.num_live, setting.num_live)


def replay_epoch(
    name: str,
    epoch: Epoch,
    texts: Sequence[list[HistoryRecord]],
    prompts: dict[str, np.ndarray],
    cost: StepCost,
    setting: Setting,
    acceptance: AcceptanceModel,
) -> list[TokenReplay]:
    """One replay per batch, with the drafter and the lengths that the engine's arm has."""
    drafter, lengths, spent = SuffixDrafter(), LengthModel(), np.zeros(2)
    for visit in epoch.visits:
        for batch in visit:
            observe_records(lengths, batch)
        drafter.publish(visit[0][0].step, [record for batch in visit for record in batch])
    out = []
    for batch in texts:
        drafter.wait()
        out.append(
            replay_tokens(
                batch,
                prompts,
                drafter,
                ARMS[name](),
                cost,
                lengths,
                max_tokens=setting.max_new_tokens,
                max_draft_tokens=MAX_DRAFT_TOKENS,
                acceptance=acceptance,
                spent=spent,
            )
        )
        observe_records(lengths, batch)
        drafter.publish(1000, batch)
    return out

"""What a job says on the console: one line per step and a table at the end.

Invariants
- `format_progress` gives exactly one line whose fields keep their order and units: people read it and
  scripts split it at " | ". A number that is missing or not finite is shown as n/a, never left out.
- The summary shows measured numbers only, slowdowns and differing tokens included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
"""One record of metrics.jsonl, or the metrics of one step: name to number or None."""

REWARD_STEPS = 3


@dataclass(frozen=True, slots=True)
class ProofTotals:
    """All proof replays of a job: the same requests rolled out with speculation on and off.

    on_s, off_s: rollout seconds, summed over the replays; tokens_different must be 0 for a lossless job.
    """

    num_replays: int
    on_s: float
    off_s: float
    tokens_compared: int
    tokens_different: int

    @property
    def ratio(self) -> float:
        """Time without speculation over time with it; above 1 means speculation is faster."""
        return self.off_s / self.on_s if self.on_s > 0 else math.nan


def format_progress(step: int, num_steps: int, metrics: Record, seconds_left: float | None) -> str:
    """The line of one step (1-based); seconds_left: None while nobody can know."""
    left = "n/a" if seconds_left is None else format_seconds(seconds_left)
    parts = [
        f"step {step:>3}/{num_steps}",
        f"reward {_number(metrics, 'critic/rewards/mean', '.2f')}",
        f"length {_number(metrics, 'response_length/mean', '.0f')} mean "
        f"{_number(metrics, 'response_length/max', '.0f')} max",
        f"rollout {_number(metrics, 'timing_s/gen', '.2f')} s",
        f"{_number(metrics, 'das/accepted_per_round', '.2f')} accepted/round",
        f"{_number(metrics, 'perf/throughput', ',.0f')} tok/s",
        f"{left} left",
    ]
    return " | ".join(parts)


def format_summary(records: Sequence[Record]) -> str:
    """The end of a job: proof replays side by side, and the reward of the first and last steps.

    records: the records of metrics.jsonl, in order of steps. Several lines, no newline at the end.
    """
    return "\n".join([*_proof_table(records), _reward_line(records)])


def proof_totals(records: Sequence[Record]) -> ProofTotals:
    """Sums over the steps that were replayed; all zeros when none was."""
    proofs = proof_records(records)
    return ProofTotals(
        num_replays=len(proofs),
        on_s=sum(float(record["proof/gen_on_s"]) for record in proofs),
        off_s=sum(float(record["proof/gen_off_s"]) for record in proofs),
        tokens_compared=sum(int(record["proof/tokens_compared"]) for record in proofs),
        tokens_different=sum(int(record["proof/tokens_different"]) for record in proofs),
    )


def proof_records(records: Sequence[Record]) -> list[Record]:
    """The records of steps that were replayed with speculation off."""
    keys = ("proof/gen_on_s", "proof/gen_off_s", "proof/tokens_compared", "proof/tokens_different")
    return [record for record in records if all(record.get(key) is not None for key in keys)]


def format_seconds(seconds: float) -> str:
    """A duration as people say it: 45s, 2m10s, 1h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def first_and_last_reward(records: Sequence[Record]) -> tuple[float, float, int] | None:
    """(mean reward of the first n steps, of the last n steps, n); None without any reward.

    n is 3, or half of the steps in a shorter job, at least 1.
    """
    values = [record.get("critic/rewards/mean") for record in records]
    rewards = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not rewards:
        return None
    count = max(1, min(REWARD_STEPS, len(rewards) // 2))
    return sum(rewards[:count]) / count, sum(rewards[-count:]) / count, count


def _proof_table(records: Sequence[Record]) -> list[str]:
    """A row per replayed step and one of totals."""
    proofs = proof_records(records)
    if not proofs:
        return ["proof replays: none (proof.every_steps=0, or rollouts that run ahead and cannot be replayed)"]
    lines = [
        "proof replays: the same requests with and without speculation",
        f"{'step':>6}  {'with':>10}  {'without':>10}  {'ratio':>7}  {'tokens compared':>15}  {'different':>9}",
    ]
    rows = [(str(record["step"]), proof_totals([record])) for record in proofs]
    for name, row in [*rows, ("all", proof_totals(proofs))]:
        ratio = f"{row.ratio:.2f}x"
        lines.append(
            f"{name:>6}  {row.on_s:>8.2f} s  {row.off_s:>8.2f} s  {ratio:>7}  "
            f"{row.tokens_compared:>15,}  {row.tokens_different:>9,}"
        )
    return lines


def _reward_line(records: Sequence[Record]) -> str:
    """Reward at both ends of the job."""
    ends = first_and_last_reward(records)
    if ends is None:
        return "reward: n/a"
    first, last, count = ends
    steps = "step" if count == 1 else f"{count} steps"
    return f"reward: {first:.3f} in the first {steps}, {last:.3f} in the last {steps}"


def _number(metrics: Record, key: str, spec: str) -> str:
    """A metric by format spec; n/a where it is missing or not finite."""
    value = metrics.get(key)
    return "n/a" if value is None or not math.isfinite(value) else format(float(value), spec)

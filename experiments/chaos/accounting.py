"""What a job's own records say: which rollouts there are, how often, and whether they equal another job's.

Invariants: what should have been trained on follows from the settings alone (uids are a hash of seed, step, group and
sample); files are read as they are, nothing is repaired.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from slipstream.drafter.token_log import TokenLog
from slipstream.rollout.types import request_uid
from slipstream.trainer.checkpoint import latest, load_tensors
from slipstream.trainer.errors import CheckpointError

Key = tuple[int, int]
"""(step, uid)"""


@dataclass(frozen=True, slots=True)
class Books:
    """The records of a finished job. logged: rollouts.jsonl, by step and uid; remembered: the drafter's log; steps:
    in metrics.jsonl. repeated: how many records are there more than once, over all three."""

    logged: dict[Key, dict[str, Any]]
    remembered: dict[Key, list[int]]
    steps: list[int]
    repeated: int


def read_books(run_dir: Path) -> Books:
    """Reads a run folder; a line or a log that cannot be read is an error."""
    records = _jsonl(run_dir / "rollouts.jsonl")
    steps = [int(record["step"]) for record in _jsonl(run_dir / "metrics.jsonl")]
    log = TokenLog.open(run_dir / "history")
    memory = [((record.step, record.uid), record.tokens.tolist()) for record in log.records()]
    log.close()
    logged = Counter(int(record["uid"]) for record in records)
    remembered = Counter(uid for (_, uid), _ in memory)
    repeated = sum(sum(count.values()) - len(count) for count in (logged, remembered, Counter(steps)))
    return Books(
        {(int(record["step"]), int(record["uid"])): record for record in records}, dict(memory), steps, repeated
    )


def expected_keys(seed: int, num_steps: int, num_groups: int, num_samples: int) -> set[Key]:
    """What a synchronous job trains on."""
    return {
        (step, request_uid(seed, step, group, sample))
        for step in range(1, num_steps + 1)
        for group in range(num_groups)
        for sample in range(num_samples)
    }


def compare(expected: set[Key], undisturbed: Books, disturbed: Books) -> dict[str, int]:
    """Counts over the two jobs. lost: rollouts and steps that should be there and are not, in any of the records;
    duplicated: records more than once; left_out: rollouts without a reward, beyond those of the undisturbed job."""
    num_steps = max(step for step, _ in expected)
    lost = len(expected - disturbed.logged.keys()) + len(expected - disturbed.remembered.keys())
    lost += len(set(range(1, num_steps + 1)) - set(disturbed.steps))
    tokens_different = rewards_different = tokens_compared = 0
    for key, record in undisturbed.logged.items():
        other = disturbed.logged.get(key, {"tokens": [], "reward": None})
        tokens_compared += max(len(record["tokens"]), len(other["tokens"]))
        tokens_different += _different(record["tokens"], other["tokens"])
        tokens_different += _different(record["tokens"], disturbed.remembered.get(key, []))
        rewards_different += record["reward"] != other["reward"]
    missing = [sum(r["reward"] is None for r in books.logged.values()) for books in (undisturbed, disturbed)]
    return {
        "lost": lost,
        "duplicated": disturbed.repeated,
        "unexpected": len(disturbed.logged.keys() - expected),
        "tokens_compared": tokens_compared,
        "tokens_different": tokens_different,
        "rewards_different": rewards_different,
        "left_out": missing[1] - missing[0],
    }


def weights_difference(first: Path, second: Path) -> float:
    """The largest absolute difference over policy and optimiser of the newest checkpoints of two runs."""
    worst = 0.0
    for name in ("policy/model.safetensors", "optimizer.safetensors"):
        mine, other = (load_tensors(_newest(run_dir) / name) for run_dir in (first, second))
        if mine.keys() != other.keys():
            raise CheckpointError(f"bench chaos: {name} of {first} and {second} hold different tensors")
        for key, tensor in mine.items():
            worst = max(worst, float((tensor.double() - other[key].double()).abs().max()) if tensor.numel() else 0.0)
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"bench chaos: {key} of {first} is not finite")
    return worst


def _newest(run_dir: Path) -> Path:
    found = latest(run_dir)
    if found is None:
        raise CheckpointError(f"bench chaos: {run_dir} holds no complete checkpoint")
    return found


def _different(first: list[int], second: list[int]) -> int:
    return sum(a != b for a, b in zip_longest(first, second))


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

"""chain_sum: a generated family of arithmetic problems whose answers vary in length by a factor of twenty.

A problem is a start value and keyed terms; the worked answer carries the running total from line to line:

    =7 a+5 b-2 c+9     ->     a+5=12
                              b-2=10
                              c+9=19
                              #### 19

Invariants
- Keys run a..z, A..Z, so the next term of a chain is found without counting; running totals stay in 0..99 and
  terms are single non-zero digits.
- The split of a problem is a pure function of its question: no problem is in train for one seed or size and
  in validation for another.
- A data set is a pure function of (TaskConfig, split). Levels and lengths are stratified, so 64 prompts hold
  every level and the long tail (p99 / p50 of response lengths is at least 4).
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from slipstream.conf.schema import TaskConfig
from slipstream.trainer.errors import DataError

Split = Literal["train", "validation"]

DATA_SOURCE = "slipstream/chain_sum"
KEYS = string.ascii_letters
MAX_TOTAL = 99
LEVEL_STEPS = {1: (1, 2), 2: (3, 4), 3: (5, 8), 4: (9, 16), 5: (17, 28), 6: (29, 48)}
"""Fewest and most steps of each level."""
LEVEL_WEIGHTS = {1: 0.20, 2: 0.30, 3: 0.25, 4: 0.13, 5: 0.07, 6: 0.05}
"""Share of each level in a data set that holds all of them."""
VALIDATION_SHARE = 1 / 8
MAX_DRAWS = 2000
SLIP_SIZES = (-10, -2, -1, 1, 2, 10)
"""A forgotten or needless carry, or a miscount."""


@dataclass(frozen=True, slots=True)
class ChainSum:
    """One problem: `start` in 0..99 and up to 52 `terms` in -9..9, none of them 0."""

    start: int
    terms: tuple[int, ...]

    @property
    def question(self) -> str:
        """The text of the prompt."""
        terms = (f"{key}{term:+d}" for key, term in zip(KEYS, self.terms, strict=False))
        return " ".join([f"={self.start}", *terms])

    @property
    def answer(self) -> str:
        """The worked answer; its last line is `#### N` as in GSM8K."""
        lines, total = [], self.start
        for key, term in zip(KEYS, self.terms, strict=False):
            total += term
            lines.append(f"{key}{term:+d}={total}")
        return "\n".join([*lines, f"#### {total}"])

    @property
    def result(self) -> str:
        """The number after `####`."""
        return str(self.start + sum(self.terms))

    @property
    def level(self) -> int:
        """Difficulty, 1 to 6, by number of steps."""
        return next(level for level, (low, high) in LEVEL_STEPS.items() if low <= len(self.terms) <= high)

    @property
    def split(self) -> Split:
        """The only split this problem may appear in."""
        digest = hashlib.blake2b(self.question.encode(), digest_size=8).digest()
        return "validation" if int.from_bytes(digest, "little") < VALIDATION_SHARE * 2**64 else "train"


def draw_problem(rng: np.random.Generator, num_steps: int) -> ChainSum:
    """A problem of `num_steps` steps, uniform over the terms that keep the running total in 0..99."""
    start = total = int(rng.integers(0, MAX_TOTAL + 1))
    terms = []
    for _ in range(num_steps):
        allowed = [t for t in range(-9, 10) if t and 0 <= total + t <= MAX_TOTAL]
        terms.append(int(rng.choice(allowed)))
        total += terms[-1]
    return ChainSum(start, tuple(terms))


def worked_with_slips(problem: ChainSum, rng: np.random.Generator, slip_rate: float) -> str:
    """The worked answer as someone careless writes it: each sum is off by a little with probability `slip_rate`.

    The chain goes on from the wrong total, so a slip is one wrong sum in an otherwise consistent answer. A slip
    that would take a later total out of 0..99 is not made.
    """
    totals = problem.start + np.cumsum(problem.terms)
    for step in range(len(totals)):
        size = int(rng.choice(SLIP_SIZES)) if rng.random() < slip_rate else 0
        if totals[step:].min() + size >= 0 and totals[step:].max() + size <= MAX_TOTAL:
            totals[step:] += size
    lines = [f"{key}{term:+d}={total}" for key, term, total in zip(KEYS, problem.terms, totals, strict=False)]
    return "\n".join([*lines, f"#### {totals[-1]}"])


def level_counts(num_problems: int, min_level: int, max_level: int) -> dict[int, int]:
    """Problems per level: LEVEL_WEIGHTS by largest remainder, with at least one each where there is room."""
    levels = range(min_level, max_level + 1)
    floor = 1 if num_problems >= len(levels) else 0
    spare = num_problems - floor * len(levels)
    total = sum(LEVEL_WEIGHTS[level] for level in levels)
    # The level's fair share less the one it already has; longer levels win ties, they are the scarce ones.
    due = {level: max(0.0, num_problems * LEVEL_WEIGHTS[level] / total - floor) for level in levels}
    scale = spare / sum(due.values()) if sum(due.values()) else 0.0
    counts = {level: floor + int(due[level] * scale) for level in levels}
    rest = sorted(levels, key=lambda level: (int(due[level] * scale) - due[level] * scale, -level))
    for i in range(num_problems - sum(counts.values())):
        counts[rest[i % len(rest)]] += 1
    return counts


def make_problems(task: TaskConfig, split: Split) -> list[ChainSum]:
    """The distinct problems of one split, in random order.

    Raises DataError when a level holds fewer distinct problems than asked for.
    """
    num_problems = task.num_train if split == "train" else task.num_validation
    rng = np.random.default_rng([task.seed, 0 if split == "train" else 1])
    problems: dict[ChainSum, None] = {}
    for level, count in level_counts(num_problems, task.min_level, task.max_level).items():
        low, high = LEVEL_STEPS[level]
        # One draw from each of `count` equal slices of the level: small sets still hold its longest problems.
        wanted = low + ((np.arange(count) + rng.random(count)) / max(count, 1) * (high - low + 1)).astype(int)
        for num_steps in wanted:
            problem = _draw_new(rng, int(num_steps), level, split, problems)
            if problem is None:
                raise DataError(
                    f"data.task.num_{split}={num_problems}: level {level} has too few distinct {split} "
                    f"problems; ask for fewer, or raise data.task.max_level (now {task.max_level})"
                )
            problems[problem] = None
    return [list(problems)[i] for i in rng.permutation(len(problems))]


def _draw_new(
    rng: np.random.Generator, num_steps: int, level: int, split: Split, seen: Container[ChainSum]
) -> ChainSum | None:
    for _ in range(MAX_DRAWS):
        problem = draw_problem(rng, num_steps)
        if problem.split == split and problem not in seen:
            return problem
        # One-step problems run out first; another length of the same level keeps the level's share.
        num_steps = int(rng.integers(LEVEL_STEPS[level][0], LEVEL_STEPS[level][1] + 1))
    return None


def stream_problems(seed: int) -> Iterator[ChainSum]:
    """Endless train-split problems of all levels, repeats allowed: the demonstrations of the warm start."""
    rng = np.random.default_rng([seed, 2])
    levels, weights = list(LEVEL_WEIGHTS), list(LEVEL_WEIGHTS.values())
    while True:
        low, high = LEVEL_STEPS[int(rng.choice(levels, p=weights))]
        problem = draw_problem(rng, int(rng.integers(low, high + 1)))
        if problem.split == "train":
            yield problem


def make_rows(task: TaskConfig, split: Split) -> list[dict[str, Any]]:
    """The rows of one split in verl's format; `extra_info.answer` is the worked answer."""
    return [
        {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": problem.question}],
            "ability": "arithmetic",
            "reward_model": {"style": "exact", "ground_truth": problem.result},
            "extra_info": {
                "split": split,
                "index": index,
                "level": problem.level,
                "num_steps": len(problem.terms),
                "answer": problem.answer,
            },
        }
        for index, problem in enumerate(make_problems(task, split))
    ]

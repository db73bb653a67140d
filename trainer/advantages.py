"""Advantages of a group's samples over each other: GRPO, Dr. GRPO, RLOO, and the baseline form of REINFORCE++.

Invariants
- A sample that was left out (reward not finite, or `keep` false) never moves the statistics of the others
  and has advantage 0; it is counted, so that a broken reward function shows up in the metrics.
- A group whose rewards are all equal carries exactly 0, whatever the rounding of its mean (REINFORCE++ aside, which
  whitens over the whole batch afterwards).
- The result never depends on the order of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"]

STD_EPS = 1e-6
"""Added to a group's standard deviation, as in verl."""
WHITEN_EPS = 1e-8
"""Added to the variance before its root is taken, as in verl's masked_whiten."""


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """What the groups of one step looked like.

    num_groups: groups with at least one sample that counts. num_uniform: groups of two or more whose
    rewards are all equal, so nothing is learned from them. num_single: groups with one sample that counts.
    num_left_out: samples that do not count.
    """

    num_groups: int
    num_uniform: int
    num_single: int
    num_left_out: int


def compute_advantages(
    name: Advantage,
    rewards: np.ndarray,
    groups: np.ndarray,
    lengths: np.ndarray,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, GroupCounts]:
    """One advantage for each sample, the same for all of its tokens.

    grpo: `(r - mean) / (std + 1e-6)` (DeepSeekMath, arXiv 2402.03300, section 4.1.2). dr_grpo: `r - mean` (arXiv
    2503.20783, section 3.2). rloo: r less the mean of the *other* samples (arXiv 2402.14740, section 3.3).
    reinforce_pp_baseline: `r - mean`, then whitened over all tokens of the batch (REINFORCE++, arXiv 2501.03262,
    section 3.2). A group of one keeps its reward (grpo divides it by 1 + 1e-6), as in verl.

    rewards: [N] float, NaN or infinite means left out. groups: [N] integers, any labels. lengths: [N] tokens of each
    response, the weights of the whitening. keep: [N] bool, false leaves a sample out. Returns ([N] float32, counts).
    Raises ValueError when the shapes differ or the name is unknown.
    """
    if name not in get_args(Advantage):
        raise ValueError(f"advantage is {name!r}; allowed: {', '.join(get_args(Advantage))}")
    advantages, counts = _group_relative(name, rewards, groups, keep)
    if name == "reinforce_pp_baseline":
        weights = np.where(_counted(rewards, keep), np.asarray(lengths, np.float64), 0.0)
        advantages = _whiten(advantages, weights)
    return advantages.astype(np.float32), counts


def uniform_groups(rewards: np.ndarray, groups: np.ndarray) -> list[int]:
    """Labels of the groups from which nothing is learned: their rewards are all equal, or none has a reward.

    These are the groups that dynamic sampling replaces (DAPO, arXiv 2503.14476, equation 11). rewards: [N], NaN where
    a sample was left out; groups: [N] integers.
    """
    out = []
    for label in np.unique(groups):
        of_group = rewards[(groups == label) & np.isfinite(rewards)]
        if not len(of_group) or of_group.min() == of_group.max():
            out.append(int(label))
    return out


def _counted(rewards: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    counted = np.isfinite(np.asarray(rewards, np.float64))
    return counted if keep is None else counted & np.asarray(keep, bool)


def _group_relative(
    name: Advantage, rewards: np.ndarray, groups: np.ndarray, keep: np.ndarray | None
) -> tuple[np.ndarray, GroupCounts]:
    """float64 advantages over the own group."""
    rewards, groups = np.asarray(rewards, np.float64), np.asarray(groups)
    counted = _counted(rewards, keep)
    if rewards.ndim != 1 or groups.shape != rewards.shape or counted.shape != rewards.shape:
        raise ValueError(f"rewards {rewards.shape}, groups {groups.shape}: allowed are two arrays of shape [N]")
    advantages = np.zeros(len(rewards), np.float64)
    uniform = single = 0
    labels = np.unique(groups[counted])
    for label in labels:
        rows = counted & (groups == label)
        of_group = rewards[rows]
        size = len(of_group)
        if size == 1:
            single += 1
            mean, scale = 0.0, 1.0 / (1.0 + STD_EPS) if name == "grpo" else 1.0
        elif of_group.min() == of_group.max():
            uniform += 1
            continue
        else:
            mean, scale = float(of_group.mean()), 1.0
            if name == "grpo":
                scale = 1.0 / (float(of_group.std(ddof=1)) + STD_EPS)
            elif name == "rloo":
                # r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
                scale = size / (size - 1)
        advantages[rows] = (of_group - mean) * scale
    return advantages, GroupCounts(len(labels), uniform, single, int((~counted).sum()))


def _whiten(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 over tokens: sample i counts weights[i] times, 0 leaves it at 0."""
    total = weights.sum()
    if total < 2:
        return np.where(weights > 0, values, 0.0)
    mean = (weights * values).sum() / total
    variance = (weights * (values - mean) ** 2).sum() / (total - 1)
    return np.where(weights > 0, (values - mean) / np.sqrt(variance + WHITEN_EPS), 0.0)

"""Group-relative advantages of GRPO.

Invariants
- A sample that was left out (reward not finite, or `keep` false) never moves the statistics of its group
  and has advantage 0; it is counted, so that a broken reward function shows up in the metrics.
- A group whose rewards are all equal carries exactly 0, whatever the rounding of its mean.
- The result depends on the rewards of the own group alone, never on the order of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


def grpo_advantages(
    rewards: np.ndarray,
    groups: np.ndarray,
    normalize_by_std: bool,
    eps: float = 1e-6,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, GroupCounts]:
    """Advantage of each sample over the other samples of its prompt.

    `(r - mean) / (std + eps)` with the unbiased standard deviation over the group (DeepSeekMath, arXiv
    2402.03300, section 4.1.2); without `normalize_by_std` only `r - mean` (Dr. GRPO, arXiv 2503.20783). A
    group of one is compared with mean 0 and standard deviation 1, as in verl's
    compute_grpo_outcome_advantage.

    rewards: [N] float, NaN or infinite means left out. groups: [N] integers, any labels. keep: [N] bool,
    false leaves a sample out. Returns ([N] float32, counts). Raises ValueError when the shapes differ.
    """
    rewards = np.asarray(rewards, np.float64)
    groups = np.asarray(groups)
    counted = np.isfinite(rewards)
    if keep is not None:
        counted = counted & np.asarray(keep, bool)
    if rewards.ndim != 1 or groups.shape != rewards.shape or counted.shape != rewards.shape:
        raise ValueError(f"rewards {rewards.shape}, groups {groups.shape}: allowed are two arrays of shape [N]")
    advantages = np.zeros(len(rewards), np.float64)
    uniform = single = 0
    labels = np.unique(groups[counted])
    for label in labels:
        rows = counted & (groups == label)
        of_group = rewards[rows]
        if len(of_group) == 1:
            single += 1
            mean, std = 0.0, 1.0
        elif of_group.min() == of_group.max():
            uniform += 1
            continue
        else:
            mean, std = float(of_group.mean()), float(of_group.std(ddof=1))
        advantages[rows] = (of_group - mean) / (std + eps if normalize_by_std else 1.0)
    counts = GroupCounts(len(labels), uniform, single, int((~counted).sum()))
    return advantages.astype(np.float32), counts

"""Advantages: worked examples, left-out samples, and independence of order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.trainer.advantages import Advantage, GroupCounts, compute_advantages, uniform_groups


def group_advantages(
    rewards: np.ndarray, groups: np.ndarray, normalize_by_std: bool, keep: np.ndarray | None = None
) -> tuple[np.ndarray, GroupCounts]:
    name: Advantage = "grpo" if normalize_by_std else "dr_grpo"
    return compute_advantages(name, rewards, groups, np.ones(len(rewards)), keep)


def test_group_of_four_by_hand() -> None:
    advantages, counts = group_advantages(np.array([1.0, 0, 0, 1]), np.zeros(4, int), normalize_by_std=True)
    unbiased_std = np.sqrt(4 * 0.25 / 3)
    np.testing.assert_allclose(advantages, np.array([0.5, -0.5, -0.5, 0.5]) / (unbiased_std + 1e-6), rtol=1e-6)
    assert advantages.dtype == np.float32
    assert counts == GroupCounts(num_groups=1, num_uniform=0, num_single=0, num_left_out=0)


def test_without_std_only_the_mean_is_taken_off() -> None:
    advantages, _ = group_advantages(np.array([3.0, 1, 5, 5]), np.array([7, 7, 9, 9]), normalize_by_std=False)
    np.testing.assert_array_equal(advantages, np.array([1, -1, 0, 0], np.float32))


def test_equal_rewards_give_exactly_zero_and_are_counted() -> None:
    advantages, counts = group_advantages(np.full(7, 0.1), np.array([0, 0, 0, 1, 1, 1, 1]), normalize_by_std=True)
    np.testing.assert_array_equal(advantages, np.zeros(7, np.float32))
    assert counts.num_uniform == counts.num_groups == 2


def test_left_out_samples_do_not_move_their_group() -> None:
    rewards = np.array([1.0, np.nan, 0.0, np.inf, 1.0, 100.0])
    keep = np.array([True, True, True, True, True, False])
    advantages, counts = group_advantages(rewards, np.zeros(6, int), normalize_by_std=True, keep=keep)
    alone, _ = group_advantages(np.array([1.0, 0, 1]), np.zeros(3, int), normalize_by_std=True)
    np.testing.assert_array_equal(advantages, [alone[0], 0, alone[1], 0, alone[2], 0])
    assert counts == GroupCounts(num_groups=1, num_uniform=0, num_single=0, num_left_out=3)


def test_group_of_one_keeps_its_reward() -> None:
    advantages, counts = group_advantages(np.array([0.5, np.nan]), np.zeros(2, int), normalize_by_std=False)
    np.testing.assert_array_equal(advantages, np.array([0.5, 0], np.float32))
    assert counts.num_single == 1


def test_all_left_out_and_empty() -> None:
    advantages, counts = group_advantages(np.full(3, np.nan), np.arange(3), normalize_by_std=True)
    np.testing.assert_array_equal(advantages, np.zeros(3))
    assert counts == GroupCounts(0, 0, 0, 3)
    assert group_advantages(np.zeros(0), np.zeros(0, int), normalize_by_std=True)[0].shape == (0,)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"rewards \(3,\), groups \(2,\)"):
        group_advantages(np.zeros(3), np.zeros(2, int), normalize_by_std=True)


@given(
    rows=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, float("nan")]), st.integers(0, 3)), max_size=24),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_order_does_not_matter_and_groups_sum_to_zero(rows: list[tuple[float, int]], seed: int) -> None:
    rewards = np.array([reward for reward, _ in rows], np.float64)
    groups = np.array([group for _, group in rows], np.int64)
    advantages, counts = group_advantages(rewards, groups, normalize_by_std=True)
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled, shuffled_counts = group_advantages(rewards[order], groups[order], normalize_by_std=True)
    np.testing.assert_allclose(shuffled, advantages[order], atol=1e-6)
    assert shuffled_counts == counts
    for group in np.unique(groups):
        members = (groups == group) & np.isfinite(rewards)
        if members.sum() > 1:
            assert abs(float(advantages[members].sum())) < 1e-5


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    advantages, _ = compute_advantages("rloo", np.array([1.0, 0, 0, 2, 7]), np.array([0, 0, 0, 0, 1]), np.ones(5))
    np.testing.assert_allclose(advantages, [1 - 2 / 3, -1, -1, 2 - 1 / 3, 7], rtol=1e-6)


def test_reinforce_pp_baseline_is_white_over_tokens() -> None:
    rewards, groups = np.array([1.0, 0, 5, 3, np.nan]), np.array([0, 0, 1, 1, 1])
    lengths = np.array([3, 1, 10, 2, 4])
    advantages, counts = compute_advantages("reinforce_pp_baseline", rewards, groups, lengths)
    tokens = np.repeat(advantages[:4].astype(np.float64), lengths[:4])
    assert tokens.mean() == pytest.approx(0, abs=1e-6)
    assert tokens.var(ddof=1) == pytest.approx(1, abs=1e-5)
    assert advantages[4] == 0
    assert counts.num_left_out == 1


def test_reinforce_pp_baseline_of_one_token_or_none() -> None:
    one, _ = compute_advantages("reinforce_pp_baseline", np.array([2.0]), np.array([0]), np.array([1]))
    assert one.tolist() == [2.0]
    none, _ = compute_advantages("reinforce_pp_baseline", np.full(2, np.nan), np.zeros(2, int), np.ones(2))
    assert none.tolist() == [0.0, 0.0]


def test_groups_that_teach_nothing() -> None:
    rewards = np.array([1.0, 1, np.nan, 0, 1, np.nan, np.nan, 0.5])
    groups = np.array([3, 3, 3, 5, 5, 6, 6, 9])
    assert uniform_groups(rewards, groups) == [3, 6, 9]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed: grpo, dr_grpo, rloo"):
        compute_advantages("gae", np.zeros(1), np.zeros(1, int), np.ones(1))  # type: ignore[arg-type]

"""The console's lines are an interface: their exact text is what is tested."""

from __future__ import annotations

import math

import pytest

from slipstream.trainer.progress import format_progress, format_seconds, format_summary, proof_totals

METRICS = {
    "critic/rewards/mean": 0.534,
    "response_length/mean": 61.3,
    "response_length/max": 402.0,
    "timing_s/gen": 1.416,
    "das/accepted_per_round": 4.312,
    "perf/throughput": 8213.7,
}


def test_the_line_of_a_step() -> None:
    assert format_progress(12, 32, METRICS, 130.2) == (
        "step  12/32 | reward 0.53 | length 61 mean 402 max | rollout 1.42 s | 4.31 accepted/round | "
        "8,214 tok/s | 2m10s left"
    )


def test_missing_and_broken_numbers_keep_their_place() -> None:
    line = format_progress(1, 1000, {"critic/rewards/mean": math.nan, "timing_s/gen": None}, None)
    assert line == (
        "step   1/1000 | reward n/a | length n/a mean n/a max | rollout n/a s | n/a accepted/round | "
        "n/a tok/s | n/a left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-3, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (130, "2m10s"),
        (3599.7, "1h00m"),
        (3900, "1h05m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def proof(step: int, on_s: float, off_s: float, compared: int, different: int) -> dict[str, float]:
    return {
        "step": step,
        "critic/rewards/mean": step / 10,
        "proof/gen_on_s": on_s,
        "proof/gen_off_s": off_s,
        "proof/tokens_compared": compared,
        "proof/tokens_different": different,
    }


def test_the_summary_sets_both_ways_side_by_side() -> None:
    plain = [{"step": step, "critic/rewards/mean": step / 10} for step in (1, 2, 3, 5)]
    records = [*plain[:3], proof(4, 1.5, 3.0, 12_345, 0), plain[3], proof(6, 2.5, 2.0, 1_000, 3)]
    assert format_summary(records).splitlines() == [
        "proof replays: the same requests with and without speculation",
        "  step        with     without    ratio  tokens compared  different",
        "     4      1.50 s      3.00 s    2.00x           12,345          0",
        "     6      2.50 s      2.00 s    0.80x            1,000          3",
        "   all      4.00 s      5.00 s    1.25x           13,345          3",
        "reward: 0.200 in the first 3 steps, 0.500 in the last 3 steps",
    ]
    assert proof_totals(records).ratio == 1.25


def test_the_summary_of_a_short_job_without_proofs() -> None:
    records = [{"step": 1, "critic/rewards/mean": 0.25}, {"step": 2, "critic/rewards/mean": None}]
    assert format_summary(records).splitlines() == [
        "proof replays: none (proof.every_steps=0, or rollouts that run ahead and cannot be replayed)",
        "reward: 0.250 in the first step, 0.250 in the last step",
    ]
    assert format_summary([]).endswith("reward: n/a")

"""The drafter index bench: its corpus is a function of its arguments, and it answers every question it names."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from slipstream.drafter import suffix, suffix_native
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.drafter_index.corpus import VOCAB, make_corpus
from slipstream.experiments.drafter_index.run import add_arguments, run
from slipstream.kernels.dispatch import KernelError

KEYS = {
    "insert_tokens_per_s",
    "freeze_tokens_per_s",
    "step_us_256",
    "step_us_1024",
    "bytes_per_token",
    "accepted_per_round",
}


def test_the_corpus_is_reproducible() -> None:
    one, two, other = (make_corpus(3, 2, 1, 100, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.rollouts, two.rollouts)
    assert (one.rollouts != other.rollouts).any()
    assert one.rollouts.shape == (3, 2, 100)
    assert one.held_out.shape == (3, 1, 100)
    assert 0 <= one.rollouts.min() <= one.rollouts.max() < VOCAB


def test_the_bench_answers() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    small = ["--prompts", "4", "--samples", "8", "--length", "256", "--steps", "8", "--rounds", "1"]
    result = run(parser.parse_args([*small, "--baseline-prompts", "2"]))
    assert result.keys() >= KEYS
    assert all(result[key] > 0 for key in KEYS - {"accepted_per_round"})
    accepted = result["accepted_per_round"]
    assert accepted["suffix"] > max(accepted["ngram"], accepted["last_epoch_only"])


def test_an_index_asked_for_by_name_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SuffixDrafter().index_name == SuffixDrafter(index="native").index_name == "native"
    assert SuffixDrafter(index="reference").index_name == "reference"
    with pytest.raises(ValueError, match="allowed: auto, native, reference"):
        SuffixDrafter(index="natve")  # type: ignore[arg-type]
    monkeypatch.setattr(suffix_native, "_native", None)
    monkeypatch.setattr(suffix, "NATIVE_ERROR", "not built")
    with pytest.raises(KernelError, match="index=native"):
        SuffixDrafter(index="native")
    auto = SuffixDrafter()
    assert (auto.index_name, auto.index_reason) == ("reference", "not built")

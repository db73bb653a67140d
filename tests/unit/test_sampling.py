"""Law 1: noise, filters and verification; the native sampler against its plain twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slipstream.kernels import _native, reference  # type: ignore[attr-defined]
from slipstream.kernels.dispatch import NativeKernels, ReferenceKernels
from slipstream.kernels.reference import SamplingRows

# Known answers published with Random123: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def make_rows(num: int, **overrides: object) -> SamplingRows:
    values: dict[str, np.ndarray] = {
        "seed": np.full(num, 7, np.uint64),
        "uid": np.arange(100, 100 + num, dtype=np.uint64) << np.uint64(33),
        "position": np.arange(num, dtype=np.int32),
        "temperature": np.ones(num, np.float32),
        "top_p": np.ones(num, np.float32),
        "top_k": np.zeros(num, np.int32),
        "remaining": np.full(num, 1000, np.int32),
        "stop_ids": np.zeros(0, np.int32),
        "stop_offsets": np.zeros(num + 1, np.int32),
    }
    for name, value in overrides.items():
        values[name] = np.asarray(value, values[name].dtype)
    return SamplingRows(**values)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    assert tuple(reference.philox4x32(np.array([counter], np.uint32), key)[0]) == expected
    assert tuple(_native.philox4x32(list(counter), *key)) == expected


def test_noise_is_bit_equal_to_the_twin() -> None:
    for position in range(40):
        seed, uid = 2**62 + 12345 * position, 2**63 - 1 - position
        expected = reference.gumbel(seed, uid, position, 25_003)
        np.testing.assert_array_equal(_native.gumbel(seed, uid, position, 25_003), expected)


def test_noise_depends_on_every_key() -> None:
    base = reference.gumbel(1, 2, 3, 64)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**40, 2, 3), (1, 2 + 2**40, 3)):
        assert not np.array_equal(base, reference.gumbel(*other, 64))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(1, 90),
    temperature=st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 500]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    ties=st.booleans(),
)
def test_native_equals_reference(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, size=4)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    logits = rng.normal(0, 4, size=(offsets[-1], vocab)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    drafts = rng.integers(0, min(vocab, 3), size=offsets[-1]).astype(np.int32)
    drafts[offsets[1:] - 1] = -1
    rows = make_rows(
        4,
        seed=rng.integers(0, 2**62, 4),
        temperature=[temperature] * 4,
        top_p=[top_p] * 4,
        top_k=[top_k] * 4,
        remaining=rng.integers(1, 4, 4),
        stop_ids=[0, 1],
        stop_offsets=[0, 0, 1, 2, 2],
    )
    expected = reference.sample_verify(logits, offsets, drafts, rows)
    got = NativeKernels("test").sample_verify(torch.from_numpy(logits), offsets, drafts, rows)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.count, expected.count)
    np.testing.assert_array_equal(got.finish, expected.finish)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_follow_the_ancestral_distribution(temperature: float, top_p: float) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 0.7, size=12).astype(np.float32)
    draws = 40_000
    rows = make_rows(
        draws,
        uid=np.arange(draws),
        position=np.zeros(draws),
        temperature=[temperature] * draws,
        top_p=[top_p] * draws,
    )
    batch = torch.from_numpy(np.tile(logits, (draws, 1)))
    offsets = np.arange(draws + 1, dtype=np.int64)
    got = NativeKernels("test").sample_verify(batch, offsets, np.full(draws, -1, np.int32), rows)
    scaled = (logits / np.float32(temperature)).astype(np.float64)
    weights = np.exp(scaled - scaled.max()) * reference.filter_mask(scaled, 0, top_p)
    probs = weights / weights.sum()
    counts = np.bincount(got.tokens, minlength=12)
    kept = probs > 0
    assert kept.sum() > 1
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], probs[kept] * draws).pvalue > 1e-3
    np.testing.assert_allclose(got.logprobs, np.log(probs[got.tokens]), atol=1e-5)


def test_drafted_samples_follow_the_same_distribution() -> None:
    """A draft that is right with probability p(x) is accepted with that probability, and never bends the sample."""
    rng = np.random.default_rng(5)
    first, second = rng.normal(0, 1.2, size=(2, 8)).astype(np.float32)
    draws = 20_000
    logits = np.tile(np.stack([first, second]), (draws, 1))
    offsets = 2 * np.arange(draws + 1, dtype=np.int64)
    drafts = np.full(2 * draws, -1, np.int32)
    drafts[::2] = 3
    rows = make_rows(draws, uid=np.arange(draws), position=np.zeros(draws))
    got = NativeKernels("test").sample_verify(torch.from_numpy(logits), offsets, drafts, rows)
    first, second = first.astype(np.float64), second.astype(np.float64)
    probs = np.exp(first) / np.exp(first).sum()
    accepted = got.count == 2
    assert stats.binomtest(int(accepted.sum()), draws, float(probs[3])).pvalue > 1e-3
    counts = np.bincount(got.tokens[::2], minlength=8)
    assert stats.chisquare(counts, probs * draws).pvalue > 1e-3
    follow = np.exp(second) / np.exp(second).sum()
    after = np.bincount(got.tokens[1::2][accepted], minlength=8)
    assert stats.chisquare(after, follow * accepted.sum()).pvalue > 1e-3


def test_stop_inside_an_accepted_draft_ends_the_request() -> None:
    logits = np.full((4, 5), -30, np.float32)
    logits[np.arange(4), [1, 2, 3, 4]] = 30
    drafts = np.array([1, 2, 3, -1], np.int32)
    for kernels in (NativeKernels("test"), ReferenceKernels("test")):
        rows = make_rows(1, stop_ids=[2], stop_offsets=[0, 1])
        got = kernels.sample_verify(torch.from_numpy(logits), np.array([0, 4]), drafts, rows)
        assert got.count[0] == 2
        assert got.finish[0] == reference.FINISH_STOP
        assert list(got.tokens[:2]) == [1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_logits_fail_one_request_only(bad: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1] = bad
    for kernels in (NativeKernels("test"), ReferenceKernels("test")):
        got = kernels.sample_verify(
            torch.from_numpy(logits), np.arange(4, dtype=np.int64), np.full(3, -1, np.int32), make_rows(3)
        )
        assert list(got.finish) == [0, reference.FINISH_ERROR, 0]
        assert list(got.count) == [1, 0, 1]


def all_kernels() -> list[NativeKernels]:
    """Every instruction set that this machine has, and threads."""
    names = ("plain", "avx2", "avx512")
    best = names.index(NativeKernels("test").context.isa)
    return [NativeKernels("test", isa=name) for name in names[: best + 1]] + [NativeKernels("test", num_threads=3)]


@pytest.mark.parametrize("vocab", [1, 5, 16, 261, 20_011])
def test_flat_logits_give_the_first_greatest_noise(vocab: int) -> None:
    """Where all logits are equal every bound and every word of noise counts."""
    num = 12
    rows = make_rows(num)
    expected = [
        int(np.argmax(reference.gumbel(int(rows.seed[i]), int(rows.uid[i]), int(rows.position[i]), vocab)))
        for i in range(num)
    ]
    offsets, drafts = np.arange(num + 1), np.full(num, -1, np.int32)
    for kernels in all_kernels():
        got = kernels.sample_verify(torch.zeros(num, vocab), offsets, drafts, rows)
        assert got.tokens.tolist() == expected, kernels.reason


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 300, "top_p": 0.95}])
def test_bits_do_not_depend_on_instruction_set_or_threads(filters: dict[str, float]) -> None:
    rng, num, vocab = np.random.default_rng(3), 40, 1234
    logits = torch.from_numpy(rng.normal(0.0, 3.0, (num, vocab)).astype(np.float32))
    rows = make_rows(num, temperature=np.full(num, 0.8), **{k: np.full(num, v) for k, v in filters.items()})
    offsets, drafts = np.arange(num + 1), np.full(num, -1, np.int32)
    first, *others = [kernels.sample_verify(logits, offsets, drafts, rows) for kernels in all_kernels()]
    for other in others:
        np.testing.assert_array_equal(first.tokens, other.tokens)
        np.testing.assert_array_equal(first.logprobs, other.logprobs)
    twin = ReferenceKernels("test").sample_verify(logits, offsets, drafts, rows)
    np.testing.assert_array_equal(first.tokens, twin.tokens)
    np.testing.assert_allclose(first.logprobs, twin.logprobs, atol=1e-5)


def test_top_p_over_a_flat_and_large_vocabulary() -> None:
    """The filter orders a few tokens first and more as it needs them: here it needs nearly all."""
    vocab, num = 5000, 3
    logits = torch.from_numpy(np.random.default_rng(0).normal(0.0, 0.01, (num, vocab)).astype(np.float32))
    rows = make_rows(num, top_p=np.full(num, 0.99))
    offsets, drafts = np.arange(num + 1), np.full(num, -1, np.int32)
    native, twin = (k.sample_verify(logits, offsets, drafts, rows) for k in (NativeKernels("t"), ReferenceKernels("t")))
    np.testing.assert_array_equal(native.tokens, twin.tokens)
    np.testing.assert_allclose(native.logprobs, twin.logprobs, atol=1e-5)


def test_bfloat16_logits_are_read_as_they_are() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)).mul(4.0).bfloat16()
    rows, offsets, drafts = make_rows(6), np.arange(7), np.full(6, -1, np.int32)
    kernels = NativeKernels("test")
    got, widened = (kernels.sample_verify(x, offsets, drafts, rows) for x in (logits, logits.float()))
    np.testing.assert_array_equal(got.tokens, widened.tokens)
    np.testing.assert_array_equal(got.logprobs, widened.logprobs)

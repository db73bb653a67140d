"""Law 1 on a GPU: the Triton sampler against its plain twin. Without a CUDA device Triton's interpreter runs it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.triton_interpreter import DEVICE, triton  # isort: skip

import triton.language as tl

from slipstream.kernels import reference
from slipstream.kernels.reference import SamplingRows
from slipstream.kernels.triton import noise
from slipstream.kernels.triton import sample_verify as sv

SMALL = (64, 128)
"""Two blocks a chunk, so that small vocabularies have many splits."""


def make_rows(num: int, **overrides: object) -> SamplingRows:
    rows = SamplingRows(
        seed=np.full(num, 7, np.uint64),
        uid=np.arange(100, 100 + num, dtype=np.uint64) << np.uint64(33),
        position=np.arange(num, dtype=np.int32),
        temperature=np.ones(num, np.float32),
        top_p=np.ones(num, np.float32),
        top_k=np.zeros(num, np.int32),
        remaining=np.full(num, 1000, np.int32),
        stop_ids=np.zeros(0, np.int32),
        stop_offsets=np.zeros(num + 1, np.int32),
    )
    return replace(rows, **{name: np.asarray(value, getattr(rows, name).dtype) for name, value in overrides.items()})


def run(
    logits: torch.Tensor, offsets: np.ndarray, drafts: np.ndarray, rows: SamplingRows, tile: sv.Tile = sv.TILE
) -> reference.Verified:
    arrays = (logits.to(DEVICE), torch.from_numpy(offsets).to(DEVICE), torch.from_numpy(drafts).to(DEVICE))
    return sv.sample_verify(*arrays, sv.device_rows(rows, DEVICE), tile).to_host()


def assert_equals_twin(
    logits: torch.Tensor, offsets: np.ndarray, drafts: np.ndarray, rows: SamplingRows, tile: sv.Tile = sv.TILE
) -> reference.Verified:
    expected = reference.sample_verify(logits.float().numpy(), offsets, drafts, rows)
    got = run(logits, offsets, drafts, rows, tile)
    for name in ("tokens", "count", "finish"):
        ours, twin = getattr(got, name), getattr(expected, name)
        assert ours.dtype == twin.dtype
        np.testing.assert_array_equal(ours, twin, err_msg=name)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)
    return got


def single_rows(logits: np.ndarray) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    num = len(logits)
    return torch.from_numpy(logits), np.arange(num + 1, dtype=np.int64), np.full(num, -1, np.int32)


def agreed_drafts(logits: torch.Tensor, offsets: np.ndarray, rows: SamplingRows, wrong_every: int = 0) -> np.ndarray:
    """Drafts that are right but for every n-th row, -1 after the last row of each request. Without filters."""
    drafts = np.full(len(logits), -1, np.int32)
    for i, (first, last) in enumerate(pairwise(offsets)):
        for j in range(first, last - 1):
            place, temperature = int(rows.position[i]) + j - first, float(rows.temperature[i])
            row = logits[j].float().numpy()
            drafts[j], _ = reference.sample_row(row, int(rows.seed[i]), int(rows.uid[i]), place, temperature, 0, 1.0)
            if wrong_every and j % wrong_every == 0:
                drafts[j] = 0
    return drafts


def test_noise_is_bit_equal_to_the_twin() -> None:
    for seed, uid, position, vocab in [(1, 2, 3, 70), (2**64 - 1, 2**63 + 5, 2**31 - 1, 20_001), (2**40, 2**33, 0, 1)]:
        got = noise.gumbel(seed, uid, position, vocab, DEVICE).cpu().numpy()
        np.testing.assert_array_equal(got, reference.gumbel(seed, uid, position, vocab))


@triton.jit
def _bound_kernel(bits, exact, ceiling, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(bits + at).to(tl.uint32, bitcast=True)
    tl.store(exact + at, noise.gumbel_from_bits(words))
    tl.store(ceiling + at, noise.gumbel_ceiling(words))


def test_the_ceiling_is_above_the_noise_and_close_where_it_matters() -> None:
    edges = np.concatenate(
        [(1 << np.arange(32)) + d for d in range(-8, 9)] + [np.arange(4096), 2**32 - np.arange(4097)]
    )
    words = np.concatenate([edges % 2**32, np.random.default_rng(0).integers(0, 2**32, 2**18 - len(edges))])
    bits = torch.from_numpy(words.astype(np.uint32).view(np.int32)).to(DEVICE)
    exact, ceiling = torch.empty_like(bits, dtype=torch.float32), torch.empty_like(bits, dtype=torch.float32)
    _bound_kernel[(len(words) // 4096,)](bits, exact, ceiling, BLOCK=4096)
    slack = (ceiling.double() - exact.double()).cpu().numpy()
    assert slack.min() > 5e-5  # half of the margin is never used up
    assert slack[words > 0.9 * 2**32].max() < 4e-4


@pytest.mark.parametrize(
    ("vocab", "tile", "dtype", "wrong_every"),
    [
        (7, SMALL, torch.float32, 5),
        (7, sv.TILE, torch.bfloat16, 0),
        (130, SMALL, torch.bfloat16, 5),
        (130, sv.TILE, torch.float16, 0),
        (1000, sv.TILE, torch.float32, 0),
        (1000, (256, 512), torch.float16, 5),
    ],
)
def test_equals_the_twin_on_chains(vocab: int, tile: sv.Tile, dtype: torch.dtype, wrong_every: int) -> None:
    rng = np.random.default_rng(vocab)
    lengths = np.array([1, 3, 12, 2, 10, 4])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    logits = torch.from_numpy(rng.normal(0, 4, size=(offsets[-1], vocab)).astype(np.float32)).to(dtype)
    rows = make_rows(
        6,
        seed=rng.integers(0, 2**63, 6),
        temperature=[0.7, 0, 1, 0.7, 1, 0],
        remaining=[9, 2, 50, 1, 50, 50],
        stop_ids=[0, 1, 2, 3],
        stop_offsets=[0, 0, 1, 1, 1, 3, 4],
    )
    got = assert_equals_twin(logits, offsets, agreed_drafts(logits, offsets, rows, wrong_every), rows, tile)
    assert got.count.max() > (1 if wrong_every else 8)
    assert (got.logprobs[offsets[1] : offsets[2]] == 0).all()


@pytest.mark.parametrize(("vocab", "ties"), [(7, True), (130, False), (1000, True)])
def test_equals_the_twin_with_filters(vocab: int, ties: bool) -> None:
    rng = np.random.default_rng(vocab)
    knobs = [(k, p) for k in (0, 1, 3, 500) for p in (1.0, 0.95, 0.5, 0.05)]
    logits = rng.normal(0, 3, size=(len(knobs) + 1, vocab)).astype(np.float32)
    logits[:, 1] = -np.inf
    rows = make_rows(
        len(logits),
        temperature=[0.7, 1.0] * (len(knobs) // 2) + [0.0],
        top_k=[k for k, _ in knobs] + [3],
        top_p=[p for _, p in knobs] + [0.5],
    )
    assert_equals_twin(*single_rows(np.round(logits) if ties else logits), rows)


def kept_by_kernel(logits: np.ndarray, rows: SamplingRows) -> np.ndarray:
    """The mask of the filter kernel: [R, V] bool."""
    (num, vocab), on_device = logits.shape, sv.device_rows(rows, DEVICE)
    limits = torch.zeros((2, num), dtype=torch.int32, device=DEVICE)
    owner = torch.arange(num, dtype=torch.int32, device=DEVICE)
    sv._filter_kernel[(num,)](
        torch.from_numpy(logits).to(DEVICE), vocab, vocab, owner, num, on_device.temperature, on_device.top_p,
        on_device.top_k, limits, BLOCK=256,
    )  # fmt: skip
    threshold, cutoff = limits.cpu().numpy()
    bits = np.where(logits == 0, 0, logits / rows.temperature[:, None]).astype(np.float32).view(np.int32)
    key = (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)
    edge = threshold.view(np.uint32)[:, None]
    return (key > edge) | ((key == edge) & (np.arange(vocab) <= cutoff[:, None]))


def test_filters_keep_what_the_twin_keeps_but_for_rounding() -> None:
    rng = np.random.default_rng(11)
    logits = rng.normal(0, 2, size=(18, 200)).astype(np.float32)
    logits[::3] = np.round(logits[::3])
    logits[4::3, :100] *= -0.0
    logits[0] = 0.0
    top_p = rng.uniform(0.02, 0.999, 18).astype(np.float32)
    weights = np.exp(-np.sort(-logits[1].astype(np.float64)))
    top_p[0], top_p[1] = 0.5, weights[:20].sum() / weights.sum()  # cuts that fall on a sum
    top_k = np.where(np.arange(18) % 2, 0, rng.integers(1, 200, 18))
    top_k[0] = 100
    rows = make_rows(18, top_p=top_p, top_k=top_k)
    kept = kept_by_kernel(logits, rows)
    for i in range(18):
        expected = reference.filter_mask(logits[i], int(top_k[i]), float(top_p[i]))
        if (kept[i] != expected).any():
            order = np.argsort(-logits[i], kind="stable")[: top_k[i] or None]
            weight = np.exp(logits[i][order].astype(np.float64) - logits[i].max())
            before = (np.cumsum(weight) - weight) / weight.sum()
            assert np.abs(before[(kept[i] != expected)[order]] - top_p[i]).max() < 1e-6
            assert (kept[i] != expected).sum() <= 1
    assert (kept[0].sum(), kept[0].argmin()) == (50, 50)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e8])
def test_passing_over_blocks_changes_nothing(scale: float) -> None:
    """Rows on which the ceiling decides little: equal, rising, falling and hugely rounded values."""
    ramp = np.linspace(0, 1, 500, dtype=np.float32)
    logits = np.stack([ramp, -ramp, np.ones(500), np.tile([0, 1], 250), ramp * 0 - 3]).astype(np.float32) * scale
    for temperature in (0.7, 0.0):
        assert_equals_twin(*single_rows(logits), make_rows(5, temperature=[temperature] * 5), SMALL)


@pytest.mark.parametrize("winners", [(63, 64), (127, 128), (5, 400), (128, 129, 383)])
def test_ties_go_to_the_lowest_index(winners: tuple[int, ...]) -> None:
    logits = np.zeros((2, 401), np.float32)
    logits[:, list(winners)] = 9
    logits[1, 0] = -0.0
    got = assert_equals_twin(*single_rows(logits), make_rows(2, temperature=[0, 0]), SMALL)
    assert (got.tokens == winners[0]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_bad_logits_fail_one_request_only(bad: float, temperature: float) -> None:
    logits = np.random.default_rng(2).normal(0, 1, size=(9, 200)).astype(np.float32)
    logits[4, 199] = bad
    if bad == -np.inf:
        logits[4] = bad
    offsets = np.array([0, 3, 6, 9], np.int64)
    rows = make_rows(3, temperature=[temperature] * 3, top_k=[0, 0, 40])
    drafts = agreed_drafts(torch.from_numpy(np.nan_to_num(logits, posinf=0, neginf=0)), offsets, rows)
    got = assert_equals_twin(torch.from_numpy(logits), offsets, drafts, rows, SMALL)
    assert list(got.finish) == [0, reference.FINISH_ERROR, 0]
    assert list(got.count[:2]) == [3, 1]


def test_the_other_rows_and_the_row_stride_change_nothing() -> None:
    rng = np.random.default_rng(8)
    wide = torch.from_numpy(rng.normal(0, 3, size=(6, 400)).astype(np.float32))
    logits, offsets, drafts = wide[:, 3:333], np.arange(7, dtype=np.int64), np.full(6, -1, np.int32)
    rows = make_rows(6, temperature=[0.7] * 6)
    together = assert_equals_twin(logits, offsets, drafts, rows, SMALL)
    for i in range(6):
        one = make_rows(1, temperature=[0.7], uid=rows.uid[i : i + 1], position=rows.position[i : i + 1])
        alone = run(logits[i : i + 1], np.array([0, 1]), drafts[:1], one, SMALL)
        assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[i], together.logprobs[i])


def test_rows_past_the_last_request_and_empty_steps() -> None:
    logits = torch.zeros(5, 9)
    got = run(logits, np.array([0, 2], np.int64), np.full(5, -1, np.int32), make_rows(1))
    assert got.count[0] == 1
    assert not got.tokens[1:].any()
    empty = run(logits[:0], np.zeros(1, np.int64), np.zeros(0, np.int32), make_rows(0))
    assert len(empty.tokens) == len(empty.count) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(9)}, r"logits have shape \(9,\)"),
        ({"logits": torch.zeros(9, 2).T}, "rows contiguous"),
        ({"logits": torch.zeros(2, 9, dtype=torch.float64)}, "float64; allowed: torch.float32"),
        ({"logits": torch.zeros(1, 1).expand(2, 2**20 + 1).contiguous()}, "1048577 entries; allowed: 1 to 1048576"),
        ({"offsets": torch.zeros(2, dtype=torch.int64)}, r"allowed: torch.int64 \(3,\)"),
        ({"offsets": torch.zeros(3, dtype=torch.int32)}, "offsets are torch.int32"),
        ({"drafts": torch.zeros(3, dtype=torch.int32)}, r"allowed: torch.int32 \(2,\)"),
        ({"drafts": torch.zeros(2, dtype=torch.int64)}, "drafts are torch.int64"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "logits": torch.zeros(2, 9),
        "offsets": torch.arange(3),
        "drafts": torch.full((2,), -1, dtype=torch.int32),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        sv.sample_verify(**arguments, rows=sv.device_rows(make_rows(2), "cpu"))


@pytest.mark.parametrize(("name", "value"), [("temperature", -0.5), ("temperature", np.nan), ("top_p", 0.0)])
def test_wrong_parameters_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed"):
        sv.device_rows(make_rows(2, **{name: [1.0, value]}), "cpu")

"""Verification attention in Triton against its plain twin, its promise of equal bits, and the cache's two writers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.triton_interpreter import DEVICE, make_rows_alike  # isort: skip

from slipstream.kernels import reference
from slipstream.kernels.triton import append_kv as cache_ops
from slipstream.kernels.triton.append_kv import RequestTable, ancestor_masks, request_table
from slipstream.kernels.triton.verify_attention import (
    choose_split_keys,
    verify_attention,
    verify_attention_reference,
)

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture
def _rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    make_rows_alike(monkeypatch)


def random_parents(rng: np.random.Generator, width: int) -> list[int]:
    return [-1, *(int(rng.integers(-1, j)) for j in range(1, width))]


def make_table(
    widths: list[int], contexts: list[int], parents: list[list[int]] | None = None, slots: list[int] | None = None
) -> RequestTable:
    offsets = torch.tensor([0, *np.cumsum(widths).tolist()])
    flat = None if parents is None else torch.tensor([p for nodes in parents for p in nodes])
    slot = torch.tensor(slots if slots is not None else range(len(widths), 0, -1))
    return request_table(slot, offsets, torch.tensor(contexts), flat, DEVICE)


def make_cache(
    slots: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, slots, kv_heads, length, dim).to(DEVICE, dtype)
    return keys, values


@pytest.mark.parametrize(
    ("widths", "contexts", "kv_heads", "group", "dim", "dtype", "tree", "window", "softcap", "options"),
    [
        ([1, 32, 3], [0, 40, 300], 1, 4, 64, torch.float32, True, 0, 0.0, {"split_keys": 128}),
        ([5, 1], [130, 64], 2, 7, 80, torch.float32, True, 20, 30.0, {"split_keys": 64}),
        ([9, 2], [100, 0], 2, 1, 16, torch.float32, True, 3, 0.0, {"batch_invariant": False}),
        ([3, 6], [10, 290], 1, 7, 96, torch.bfloat16, False, 0, 5.0, {"split_keys": 128}),
        ([2, 32, 1], [600, 33, 319], 1, 7, 128, torch.bfloat16, True, 100, 0.0, {"batch_invariant": False}),
        ([4, 1], [60, 200], 1, 4, 256, torch.bfloat16, True, 0, 0.0, {}),
        ([17, 1], [70, 513], 2, 1, 64, torch.float16, True, 0, 50.0, {}),
    ],
)
def test_equals_the_plain_twin(
    widths: list[int],
    contexts: list[int],
    kv_heads: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    tree: bool,
    window: int,
    softcap: float,
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    keys, values = make_cache(len(widths) + 1, kv_heads, 640, dim, dtype)
    query = torch.randn(sum(widths), kv_heads * group, dim).to(DEVICE, dtype)
    table = make_table(widths, contexts, [random_parents(rng, w) for w in widths] if tree else None)
    for i, (width, context) in enumerate(zip(widths, contexts, strict=True)):
        keys[len(widths) - i, :, context + width :] = values[len(widths) - i, :, context + width :] = torch.nan
    arguments = (query, keys, values, table, 1.3 * dim**-0.5, window, softcap)
    expected = verify_attention_reference(*arguments)
    bound = BOUNDS[dtype]
    torch.testing.assert_close(verify_attention(*arguments, **options), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (6, 4.0)])
def test_chains_equal_the_causal_reference(window: int, softcap: float) -> None:
    torch.manual_seed(2)
    blocked = torch.randn(3, 2, 8, 24, reference.KEY_BLOCK, device=DEVICE)
    keys, values = cache_ops.from_blocked_keys(blocked), torch.randn(3, 2, 128, 24, device=DEVICE)
    widths, contexts, slots = [4, 1, 20], [30, 0, 77], [2, 0, 1]
    query = torch.randn(sum(widths), 6, 24, device=DEVICE)
    rows = torch.tensor(np.repeat(slots, widths), device=DEVICE)
    positions = torch.cat([torch.arange(c, c + w) for c, w in zip(contexts, widths, strict=True)]).to(DEVICE)
    expected = reference.ragged_attention(query, blocked, values, rows, positions, 0.2, window, softcap)
    table = make_table(widths, contexts, slots=slots)
    got = verify_attention(query, keys, values, table, 0.2, window, softcap, split_keys=64)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("window", "invariant"), [(0, True), (70, True), (0, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_a_prefix_elsewhere_is_reading_a_copy(dtype: torch.dtype, window: int, invariant: bool) -> None:
    torch.manual_seed(4)
    keys, values = make_cache(4, 2, 256, 32, dtype)
    widths, contexts, slots, lengths = [1, 7, 20], [130, 90, 150], [1, 2, 3], [129, 0, 71]
    copied = keys.clone(), values.clone()
    for slot, length in zip(slots, lengths, strict=True):
        for part, whole in zip((keys, values), copied, strict=True):
            whole[slot, :, :length] = part[0, :, :length]
            part[slot, :, :length] = torch.nan
    query = torch.randn(sum(widths), 4, 32).to(DEVICE, dtype)
    options = {"window": window, "softcap": 9.0, "batch_invariant": invariant, "split_keys": 64}
    plain = make_table(widths, contexts, slots=slots)
    offsets = torch.tensor([0, *np.cumsum(widths).tolist()])
    prefixes = torch.zeros(3), torch.tensor(lengths)
    table = request_table(torch.tensor(slots), offsets, torch.tensor(contexts), None, DEVICE, prefixes)
    got = verify_attention(query, keys, values, table, 0.2, **options)
    assert torch.equal(got, verify_attention(query, *copied, plain, 0.2, **options))
    twin = verify_attention_reference(query, keys, values, table, 0.2, window, 9.0)
    torch.testing.assert_close(got, twin, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])
    with pytest.raises(ValueError, match="prefixes: 131 keys of slot 0"):
        request_table(
            torch.tensor(slots),
            offsets,
            torch.tensor(contexts),
            None,
            DEVICE,
            (torch.zeros(3), torch.tensor([131, 0, 0])),
        )


@pytest.mark.usefixtures("_rows_alike")
@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 45)])
def test_bits_depend_on_nothing_but_what_a_token_sees(dtype: torch.dtype, window: int) -> None:
    torch.manual_seed(3)
    keys, values = make_cache(4, 1, 160, 32, dtype)
    options = {"window": window, "split_keys": 64}
    query = torch.randn(9, 4, 32).to(DEVICE, dtype)

    def attend(rows: torch.Tensor, table: RequestTable) -> torch.Tensor:
        return verify_attention(rows, keys, values, table, 0.2, **options)

    wide = attend(query, make_table([9], [122], slots=[2]))
    narrow = attend(query[:3], make_table([3], [122], slots=[2]))
    assert torch.equal(narrow, wide[:3])
    others = torch.randn(12, 4, 32).to(DEVICE, dtype)
    together = attend(
        torch.cat([others[:11], query[:3], others[11:]]), make_table([11, 3, 1], [0, 122, 130], None, [0, 2, 3])
    )
    assert torch.equal(together[11:14], narrow)
    for j in (0, 5, 8):
        assert torch.equal(attend(query[j : j + 1], make_table([1], [122 + j], slots=[2]))[0], wide[j])
    tree = attend(query, make_table([9], [122], [[-1, 0, 1, 0, 2, 4, 1, 3, 5]], [2]))
    assert torch.equal(tree[:3], wide[:3])
    short = attend(query[:3], make_table([3], [20], slots=[1]))
    assert torch.equal(attend(torch.cat([query[:3], query]), make_table([3, 9], [20, 122], slots=[1, 2]))[:3], short)


def test_no_requests_give_no_rows() -> None:
    keys, values = make_cache(1, 2, 32, 16)
    assert verify_attention(torch.empty(0, 4, 16, device=DEVICE), keys, values, make_table([], []), 1.0).shape == (
        0,
        4,
        16,
    )


def test_splits_follow_the_sum_of_keys() -> None:
    lonely = make_table([1], [32767])
    assert choose_split_keys(lonely, 0, 8, 512) == 512
    assert choose_split_keys(lonely, 4096, 8, 512) == 128
    crowd = make_table([1] * 101, [32767] + [511] * 100)
    split = choose_split_keys(crowd, 0, 8, 512)
    plan = crowd.schedule(0, split)
    assert split == 1408
    assert len(plan.work) == 24 + 100
    assert plan.spans[0].tolist() == [0, 23, 0]
    assert crowd.schedule(1000, 512).spans[0].tolist() == [62, 63, 0]


def test_ancestor_masks_equal_brute_force() -> None:
    rng = np.random.default_rng(4)
    widths = [1, 32, 32, 7, 20]
    trees = [random_parents(rng, w) for w in widths]
    trees[1] = list(range(-1, 31))
    expected = []
    for nodes in trees:
        for j in range(len(nodes)):
            seen, at = 0, j
            while at >= 0:
                seen, at = seen | 1 << at, nodes[at]
            expected.append(seen)
    parents, offsets = torch.tensor([p for nodes in trees for p in nodes]), torch.tensor([0, *np.cumsum(widths)])
    got = ancestor_masks(parents, offsets)
    assert got.dtype == torch.int32
    assert (got.numpy().view(np.uint32) == np.array(expected, np.uint32)).all()
    table = make_table(widths, [0] * 5, trees)
    assert table.depth.tolist() == [bin(mask).count("1") - 1 for mask in expected]


def test_append_writes_in_place_and_nothing_else() -> None:
    torch.manual_seed(5)
    keys, values = make_cache(3, 3, 20, 24)
    before_keys, before_values = keys.clone(), values.clone()
    new_keys, new_values = torch.randn(2, 3, 4, 24, device=DEVICE).transpose(1, 2)
    slots, positions = torch.tensor([2, 0, -1, 2], device=DEVICE), torch.tensor([19, 0, 3, 4], device=DEVICE)
    cache_ops.append_kv(keys, values, new_keys, new_values, slots, positions)
    for t in (0, 1, 3):
        before_keys[slots[t], :, positions[t]] = new_keys[t]
        before_values[slots[t], :, positions[t]] = new_values[t]
    assert torch.equal(keys, before_keys)
    assert torch.equal(values, before_values)


@pytest.mark.parametrize("layers", [0, 2])
def test_compaction_equals_a_naive_copy(layers: int) -> None:
    torch.manual_seed(6)
    rng = np.random.default_rng(7)
    shape = (4, 2, 60, 20)
    keys, values = torch.randn(2, *((layers, *shape) if layers else shape), device=DEVICE)
    counts, contexts, slots = [32, 12, 1, 0], [28, 5, 0, 9], [3, 0, 2, 1]
    accepted = torch.zeros(4, 32, dtype=torch.int32)
    for i, count in enumerate(counts):
        accepted[i, :count] = torch.from_numpy(np.sort(rng.choice(32, count, replace=False)))
    expected = [keys.clone(), values.clone()]
    for i, (slot, context, count) in enumerate(zip(slots, contexts, counts, strict=True)):
        source = (context + accepted[i, :count]).tolist()
        for old, new in zip((keys, values), expected, strict=True):
            new[..., slot, :, context : context + count, :] = old[..., slot, :, source, :]
    tables = [torch.tensor(slots), torch.tensor(contexts), accepted, torch.tensor(counts)]
    cache_ops.compact_kv(keys, values, *(t.to(DEVICE) for t in tables))
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def call(**changes: Any) -> torch.Tensor:
    """A valid call of verify_attention with some arguments replaced."""
    keys, values = make_cache(3, 2, 40, 16)
    defaults: dict[str, Any] = {
        "query": torch.randn(4, 4, 16, device=DEVICE),
        "keys": keys,
        "values": values,
        "table": make_table([3, 1], [0, 30]),
        "scale": 0.25,
    }
    return verify_attention(**(defaults | changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_table([33], [0]), "33 query tokens of request 0; allowed: 1 to 32"),
        (lambda: make_table([2, 0], [0, 0]), "0 query tokens of request 1"),
        (lambda: make_table([2], [-1]), "context_len: -1"),
        (lambda: make_table([3], [0], [[-1, 0, 2]]), "parents: 2 of token 2; allowed: -1 to 1"),
        (lambda: make_table([3], [0], [[-1, 0]]), r"parents: shape \[2\]; allowed: \[3\]"),
        (lambda: request_table(torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([0])), "query_offsets"),
        (lambda: call(query=torch.randn(5, 4, 16)), r"query: shape \[5, 4, 16\]; allowed: \[4, Hq, 16\]"),
        (lambda: call(query=torch.randn(4, 3, 16)), "query: 3 heads; allowed: a multiple of the cache's 2"),
        (lambda: call(query=torch.randn(4, 4, 16, dtype=torch.float16)), "query: dtype torch.float16"),
        (lambda: call(values=torch.randn(3, 2, 40, 16).half()), "values: dtype torch.float16"),
        (lambda: call(values=torch.randn(3, 2, 41, 16)), "values: shape"),
        (lambda: call(keys=torch.randn(3, 2, 16, 40).mT, values=torch.randn(3, 2, 40, 16)), "keys: stride 40"),
        (lambda: call(keys=torch.zeros(1, 1, 1, 257), values=torch.zeros(1, 1, 1, 257)), "head dimension 257"),
        (
            lambda: call(table=make_table([3, 1], [0, 40])),
            "context_len: 41 keys with the query tokens; allowed: up to 40",
        ),
        (lambda: call(table=make_table([3, 1], [0, 4], slots=[3, 0])), "slot: 3; allowed: 0 to 2"),
        (lambda: call(split_keys=100), "split_keys: 100; allowed: 0 or more, in steps of 64"),
        (lambda: call(window=-1), "window: -1"),
    ],
)
@pytest.mark.skipif(DEVICE != "cpu", reason="the mistakes are made with tensors on the CPU")
def test_mistakes_are_one_readable_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(DEVICE != "cpu", reason="paths on a GPU are not read back")
@pytest.mark.parametrize(
    ("path", "count", "context", "message"),
    [
        ([3, 1], 2, 0, "strictly increasing"),
        ([0, 1], 33, 0, "counts: 33 of request 0; allowed: 0 to 32"),
        ([0, 9], 2, 31, "context_len: 31 of request 0; allowed: 0 to 30"),
    ],
)
def test_bad_paths_are_refused(path: list[int], count: int, context: int, message: str) -> None:
    keys, values = make_cache(1, 1, 40, 16)
    accepted = torch.zeros(1, 32, dtype=torch.int32)
    accepted[0, :2] = torch.tensor(path)
    with pytest.raises(ValueError, match=message):
        cache_ops.compact_kv(keys, values, torch.tensor([0]), torch.tensor([context]), accepted, torch.tensor([count]))

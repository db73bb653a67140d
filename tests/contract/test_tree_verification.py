"""Draft trees, verified in one pass: same tokens, same bits, and the accepted path where a chain would have left it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import DraftBatch, HistoryRecord, LiveBatch, Price
from slipstream.drafter.ngram import NgramDrafter
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.kernels import reference
from slipstream.kernels.dispatch import NativeKernels, ReferenceKernels
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.budget import FixedBudget, PriceBudget
from slipstream.rollout.packing import plan_trees
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Rollout
from tests.contract.test_engine import make_requests, run
from tests.tiny_models import FAMILIES, tiny_model
from tests.unit.test_attention import DIM, LENGTH, make_cache
from tests.unit.test_sampling import make_rows

WIDTH = 9


class TreeBudget(FixedBudget):
    """WIDTH draft tokens in trees for every request."""

    def price(self, live: LiveBatch, *known: object) -> Price:
        rows = len(live)
        return Price(np.full(rows, WIDTH, np.int32), np.zeros(rows, np.float32), np.full(rows, 3, np.int32))


class RandomTrees(NgramDrafter):
    """Random trees with the right continuation on a random path in them, or without it."""

    def __init__(self, texts: dict[int, np.ndarray]) -> None:
        super().__init__()
        self.texts = texts

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        assert price.branching is not None
        for row, uid in enumerate(batch.uids.tolist()):
            rng = np.random.default_rng(uid + int(batch.num_generated[row]))
            right = self.texts[uid][batch.num_generated[row] :]
            at, depth = -1, 0
            for node in range(int(price.max_draft[row])):
                on_path = depth < len(right) and rng.random() < 0.6
                out.parents[row, node] = at if on_path else rng.integers(-1, node)
                out.tokens[row, node] = right[depth] if on_path else rng.integers(0, 96)
                if on_path:
                    at, depth = node, depth + 1
            out.count[row], out.source[row] = price.max_draft[row], 3


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[int, Rollout]]:
    return {family: run(TorchEngine(tiny_model(family), max_len=160), make_requests()) for family in FAMILIES}


def texts_of(rollouts: dict[int, Rollout]) -> dict[int, np.ndarray]:
    return {uid: rollout.tokens for uid, rollout in rollouts.items()}


@pytest.mark.parametrize(("family", "kernels"), [*((family, "native") for family in FAMILIES), ("qwen3", "reference")])
def test_trees_change_nothing(family: str, kernels: str, plain: dict) -> None:
    requests = make_requests()[:: 1 if kernels == "native" else 4]
    expected = {request.uid: plain[family][request.uid] for request in requests}
    drafter = RandomTrees(texts_of(expected))
    engine = TorchEngine(tiny_model(family), max_len=160, drafter=drafter, budget=TreeBudget(WIDTH), kernels=kernels)
    got = run(engine, requests)
    for uid, want in expected.items():
        np.testing.assert_array_equal(got[uid].tokens, want.tokens)
        np.testing.assert_allclose(got[uid].logprobs, want.logprobs, atol=1e-4)
        # The products of experts are torch's, whose rounding depends on how many tokens an expert gets.
        if kernels == "native" and family != "mixtral":
            np.testing.assert_array_equal(got[uid].logprobs, want.logprobs)
    stats = engine.stats()
    assert stats.accepted > stats.generated_tokens / 2


def test_other_kernels_are_asked_for_chains() -> None:
    """Triton's attention takes trees, its engine does not yet: the drafter must see no branching."""
    asked = []

    class Listening(NgramDrafter):
        def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
            asked.append(price.branching)

    engine = TorchEngine(tiny_model("qwen3"), max_len=160, drafter=Listening(), budget=TreeBudget(WIDTH))
    engine.kernels.trees = False
    run(engine, make_requests(max_new_tokens=4))
    assert asked
    assert set(asked) == {None}


def test_a_history_that_branches_is_followed_both_ways(plain: dict) -> None:
    """At four places more texts leave the right one than stay with it: a chain leaves with them."""
    requests = make_requests()[::9]
    expected = {request.uid: plain["qwen3"][request.uid] for request in requests}
    records = []
    for uid, rollout in expected.items():
        texts = [rollout.tokens]
        for place in (40, 30, 20, 10):
            wrong = rollout.tokens.copy()
            wrong[place:] = (wrong[place:] + 1 + place) % 96
            texts += [wrong] * (len(texts) + 1)
        records += [HistoryRecord(rollout.request.prompt_id, 0, uid + i, text) for i, text in enumerate(texts)]

    def accepted(branching: int) -> float:
        drafter = SuffixDrafter()
        drafter.publish(0, records)
        budget = PriceBudget(16, branching=branching)
        engine = TorchEngine(tiny_model("qwen3"), max_len=160, max_live_requests=2, drafter=drafter, budget=budget)
        assert texts_equal(run(engine, requests), expected)
        stats = engine.stats()
        return stats.accepted / stats.rounds

    assert accepted(3) > 1.25 * accepted(1)


def texts_equal(got: dict[int, Rollout], expected: dict[int, Rollout]) -> bool:
    return all(np.array_equal(got[uid].tokens, want.tokens) for uid, want in expected.items())


# ---- kernels


@dataclasses.dataclass(frozen=True)
class PackedTree:
    slots: torch.Tensor
    places: torch.Tensor
    positions: torch.Tensor
    parents: torch.Tensor


def packed_tree(seed: int, start: int, size: int) -> PackedTree:
    """A token of slot 2 at position `start`, the root, and `size` tokens of a random tree behind it; one of slot 4."""
    rng = np.random.default_rng(seed)
    before = [-1] + [int(rng.integers(0, node)) for node in range(1, size + 1)]
    depth = [0]
    for node in range(1, size + 1):
        depth.append(depth[before[node]] + 1)
    places = [7, *range(start, start + size + 1)]
    positions = [7, *(start + d for d in depth)]
    return PackedTree(
        torch.tensor([4] + [2] * (size + 1)),
        torch.tensor(places),
        torch.tensor(positions),
        torch.tensor([-1, -1] + [1 + parent for parent in before[1:]]),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 20),
    st.integers(1, 20),
    st.sampled_from([0, 1, 5, 19]),
    st.sampled_from([2, 6]),
)
def test_attention_of_a_tree_has_the_bits_of_its_paths(
    seed: int, start: int, size: int, window: int, heads: int
) -> None:
    keys, values = make_cache(seed)
    tree = packed_tree(seed, start, size)
    query = torch.randn(size + 2, heads, DIM)
    kernels = NativeKernels("test")
    got = kernels.ragged_attention(
        query, keys, values, tree.slots, tree.places, 0.2, window, 0.0, tree.positions, tree.parents
    )
    index = reference.places_by_position(tree.places, tree.positions, tree.parents)
    by_position = keys.transpose(3, 4).flatten(2, 3)
    for token, position in enumerate(tree.positions.tolist()):
        straight_keys, straight_values = by_position.clone(), values.clone()
        slot, path = int(tree.slots[token]), index[token, : position + 1]
        straight_keys[slot, :, : position + 1] = by_position[slot, :, path]
        straight_values[slot, :, : position + 1] = values[slot, :, path]
        blocked = straight_keys.unflatten(2, (LENGTH // reference.KEY_BLOCK, reference.KEY_BLOCK)).transpose(3, 4)
        alone = kernels.ragged_attention(
            query[token : token + 1],
            blocked.contiguous(),
            straight_values,
            tree.slots[token : token + 1],
            tree.positions[token : token + 1],
            0.2,
            window,
        )
        assert torch.equal(got[token], alone[0])
    twin = reference.ragged_attention(
        query, keys, values, tree.slots, tree.places, 0.2, window, 0.0, tree.positions, tree.parents
    )
    torch.testing.assert_close(got, twin, atol=2e-6, rtol=1e-5)


def test_a_tree_with_a_missing_parent_is_refused() -> None:
    keys, values = make_cache(0)
    tree = packed_tree(0, 5, 4)
    broken = tree.parents.clone()
    broken[-1] = -1
    with pytest.raises(ValueError, match="needs its parent before it"):
        NativeKernels("test").ragged_attention(
            torch.zeros(6, 2, DIM), keys, values, tree.slots, tree.places, 1.0, 0, 0.0, tree.positions + 0, broken - 1
        )


@pytest.mark.parametrize("kernels", [NativeKernels("test"), ReferenceKernels("test")])
def test_moving_touches_its_targets_only(kernels: NativeKernels | ReferenceKernels) -> None:
    keys, values = make_cache(1)
    before = keys.transpose(3, 4).flatten(2, 3).clone(), values.clone()
    slots, source, target = torch.tensor([2, 2, 0]), torch.tensor([19, 22, 30]), torch.tensor([18, 19, 3])
    kernels.move_kv(keys, values, slots, source, target)
    for now, was in zip((keys.transpose(3, 4).flatten(2, 3), values), before, strict=True):
        expected = was.clone()
        expected[slots, :, target] = was[slots, :, source]
        assert torch.equal(now, expected)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_sampling_along_a_tree(seed: int, as_chain: bool) -> None:
    """Native equals the twin on random trees, and a tree that is a chain is a chain."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 8, size=5)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    logits = rng.normal(0, 3, (offsets[-1], 5)).astype(np.float32)
    drafts = rng.integers(0, 5, offsets[-1]).astype(np.int32)
    drafts[offsets[1:] - 1] = -1
    parents = np.concatenate(
        [[-1] + [row - 1 if as_chain else int(rng.integers(0, row)) for row in range(1, size)] for size in sizes]
    ).astype(np.int32)
    rows = make_rows(5, remaining=rng.integers(1, 9, 5), stop_ids=[3], stop_offsets=[0, 1, 1, 1, 1, 1])
    got = NativeKernels("test").sample_verify(torch.from_numpy(logits), offsets, drafts, rows, parents)
    want = reference.sample_verify(logits, offsets, drafts, rows, parents)
    chain = reference.sample_verify(logits, offsets, drafts, rows) if as_chain else want
    for name in ("tokens", "count", "finish"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        np.testing.assert_array_equal(getattr(got, name), getattr(chain, name))
    assert got.path is not None
    np.testing.assert_array_equal(got.path, want.path)


# ---- the plan, and what is learned


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_plan_knows_depths_and_parents(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 12, size=3)
    drafts = DraftBatch.empty(3, 12)
    for row, count in enumerate(counts):
        drafts.parents[row, :count] = [rng.integers(-1, node) if node else -1 for node in range(count)]
    starts = rng.integers(0, 50, size=3)
    places = np.concatenate([start + np.arange(count + 1) for start, count in zip(starts, counts, strict=True)])
    plan = plan_trees(drafts, np.arange(3), counts, np.arange(len(places)), places, pad=2)
    first = np.cumsum(counts + 1) - counts - 1
    is_chain = all((drafts.parents[row, :count] == np.arange(-1, count - 1)).all() for row, count in enumerate(counts))
    assert (plan is None) == is_chain
    if plan is None:
        return
    assert list(plan.positions[-2:]) == [0, 1]
    for row, count in enumerate(counts):
        assert plan.positions[first[row]] == starts[row]
        for node in range(count):
            at, parent = first[row] + 1 + node, first[row] + 1 + drafts.parents[row, node]
            assert plan.parents[at] == parent
            assert plan.positions[at] == plan.positions[parent] + 1
            assert plan.row_parents[at] == drafts.parents[row, node] + 1


def test_a_tree_teaches_what_its_children_were_worth() -> None:
    """Of the children of an accepted token one is right; below a wrong one nothing is known."""
    cells = np.array([[0, 1, 2, 3, 4, 5]])
    parents = np.array([[-1, -1, 1, 1, 0, 3]])
    kept = np.array([[False, True, False, True, False, False]])
    model = AcceptanceModel()
    model.observe_trees(cells, np.full((1, 6), 0.5), np.array([6]), np.array([False]), parents, kept)
    assert model.seen[:6].tolist() == [1, 1, 1, 1, 0, 1]
    assert model.accepted[:6].tolist() == [0, 1, 0, 1, 0, 0]
    ended = AcceptanceModel()
    ended.observe_trees(cells, np.full((1, 6), 0.5), np.array([6]), np.array([True]), parents, kept)
    assert ended.seen[:6].tolist() == [0, 1, 0, 1, 0, 0]


def test_trees_where_the_price_is_low() -> None:
    live = LiveBatch(*(np.arange(1, 3) for _ in range(4)))
    alone, many = LiveBatch(*(np.arange(1, 2),) * 4), LiveBatch(*(np.arange(1, 65),) * 4)
    assert PriceBudget(8, branching=3).price(alone).branching.tolist() == [3]
    assert PriceBudget(8).price(live).branching is None
    assert PriceBudget(8, branching=3).price(many).branching is None

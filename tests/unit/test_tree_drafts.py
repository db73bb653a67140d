"""Tree drafts: what must hold of every tree, real paths only, and what a tree covers that a chain cannot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import SOURCE_NAMES, DraftBatch, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.calibration import NUM_CELLS
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.kernels import _native  # type: ignore[attr-defined]

START = -1
MAX_CANDIDATES = 2

Sequences = list[list[int]]
histories = st.lists(st.lists(st.integers(0, 3), max_size=14), max_size=4)
live_texts = st.lists(st.lists(st.integers(0, 3), max_size=10), min_size=1, max_size=3)


def arrays(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    return np.array([token for tokens in sequences for token in tokens], np.int32), np.cumsum([0, *map(len, sequences)])


def make_index(history: Sequences, live: Sequences, prompt: list[int], min_match: int = 2) -> _native.SuffixIndexSet:
    """One prompt; the requests 0, 1, ... have generated the texts of `live`."""
    index = _native.SuffixIndexSet(min_match=min_match, max_candidates=MAX_CANDIDATES)
    count = len(history)
    index.publish("p", *arrays(history), np.ones(count, np.float32), np.ones(count, np.uint8))
    for uid, text in enumerate(live):
        index.begin(uid, "p", np.array(prompt, np.int32))
        index.extend(np.array([uid]), *arrays([text]))
    return index


@dataclass(frozen=True)
class Tree:
    tokens: list[int]
    parents: list[int]
    probs: list[float]
    cells: list[int]
    source: str
    match_len: int

    def path(self, node: int) -> list[int]:
        """Tokens from the root to the node."""
        return [] if node < 0 else [*self.path(self.parents[node]), self.tokens[node]]

    def paths(self) -> list[list[int]]:
        return [self.path(node) for node in range(len(self.tokens))]


def trees_of(
    index: _native.SuffixIndexSet, count: int, branching: int, limit: int = 12, min_prob: float = 0.0
) -> list[Tree]:
    out, limits = DraftBatch.empty(count, 16), np.full(count, limit, np.int32)
    index.propose(
        *(np.arange(count), limits, np.full(count, min_prob, np.float32), np.full(count, branching, np.int32)),
        *(out.tokens, out.count, out.source, out.age, out.match_len, out.probs, out.cells, out.parents),
    )
    found = []
    for row, n in enumerate(out.count.tolist()):
        tokens, parents, probs, cells = (
            buffer[row, :n].tolist() for buffer in (out.tokens, out.parents, out.probs, out.cells)
        )
        source, match_len = SOURCE_NAMES[out.source[row]], int(out.match_len[row])
        found.append(Tree(tokens, parents, probs, cells, source, match_len))
    return found


def tree_of(
    history: Sequences, live: Sequences, branching: int = 2, prompt: tuple[int, ...] = (), limit: int = 12
) -> Tree:
    """Of the first request."""
    return trees_of(make_index(history, live, list(prompt)), len(live), branching, limit)[0]


def occurs(text: list[int], sequences: Sequences) -> bool:
    return any(text == s[i : i + len(text)] for s in sequences for i in range(len(s) - len(text) + 1))


@settings(max_examples=150, deadline=None)
@given(
    histories,
    live_texts,
    st.lists(st.integers(0, 3), max_size=6),
    st.sampled_from([(1, 2), (2, 2), (2, 3), (3, 4)]),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.one_of(st.none(), st.integers(0, 5)),
)
def test_every_tree_keeps_the_rules(
    history: Sequences,
    live: Sequences,
    prompt: list[int],
    sizes: tuple[int, int],
    limit: int,
    min_prob: float,
    calibration: int | None,
) -> None:
    min_match, branching = sizes
    index = make_index(history, live, prompt, min_match)
    if calibration is not None:
        index.calibrate(np.random.default_rng(calibration).uniform(0.0, 1.0, NUM_CELLS).astype(np.float32))
    texts = [[START, *tokens] for tokens in history + live] + [prompt]
    for text, tree in zip(live, trees_of(index, len(live), branching, limit, min_prob), strict=True):
        assert len(tree.tokens) <= limit
        assert (tree.source == "none") == (not tree.tokens)
        children = [(parent, token) for parent, token in zip(tree.parents, tree.tokens, strict=True)]
        assert len(set(children)) == len(children)
        context = [START, *text]
        for node, parent in enumerate(tree.parents):
            assert -1 <= parent < node
            assert tree.parents.count(parent) <= branching
            assert min_prob <= tree.probs[node] <= (1.0 if parent < 0 else tree.probs[parent])
            assert 0 <= tree.cells[node] < NUM_CELLS
            # The shortest context that may be continued, then the token: it must stand somewhere.
            before = context + tree.path(parent)
            assert occurs([*before[-min(min_match, len(before)) :], tree.tokens[node]], texts), (before, node)
        if tree.tokens:
            assert occurs([*context[-tree.match_len :], tree.tokens[0]], texts)


@settings(max_examples=100, deadline=None)
@given(histories, st.lists(st.integers(0, 3), max_size=10), st.integers(2, 3), st.integers(1, 11))
def test_a_smaller_limit_keeps_the_first_nodes(history: Sequences, text: list[int], branching: int, limit: int) -> None:
    tree, smaller = tree_of(history, [text], branching), tree_of(history, [text], branching, limit=limit)
    assert smaller.paths() == tree.paths()[:limit]
    assert smaller.probs == tree.probs[:limit]


def test_the_most_probable_tokens_come_first() -> None:
    """The third token of the frequent branch is more probable than the first of the rare one, the fourth is not."""
    tree = tree_of([[1, 2, 3, 4, 5, 10]] * 5 + [[1, 2, 6, 7]] * 4, [[1, 2]])
    assert tree.probs == sorted(tree.probs, reverse=True)
    assert tree.paths() == [[3], [3, 4], [3, 4, 5], [6], [3, 4, 5, 10], [6, 7]]
    first, other = 5 / 9.5, 4 / 9.5
    again, rest = 5 / 5.5, 4 / 4.5
    expected = [first, first * again, first * again**2, other, first * again**3, other * rest]
    assert tree.probs == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 12), st.booleans())
def test_where_text_never_forks_a_tree_is_the_chain(before: int, after: int, limit: int, is_history: bool) -> None:
    text = list(range(before + after))
    history, prompt = ([text], ()) if is_history else ([], (90, *text))
    chain = tree_of(history, [text[:before]], 1, prompt, limit)
    tree = tree_of(history, [text[:before]], 3, prompt, limit)
    assert chain == tree
    assert chain.parents == list(range(-1, len(chain.tokens) - 1))
    if before > 1 or is_history:
        assert chain.tokens == text[before : before + limit]


def test_a_tree_covers_both_continuations_that_are_as_frequent() -> None:
    history = [[1, 2, 3, 4, 5]] * 3 + [[1, 2, 6, 7, 8]] * 3
    chain, tree = tree_of(history, [[1, 2]], 1), tree_of(history, [[1, 2]], 2)
    assert chain.tokens in ([3, 4, 5], [6, 7, 8])
    paths = tree.paths()
    assert [3, 4, 5] in paths
    assert [6, 7, 8] in paths
    assert len(paths) == 6
    halves = [prob for prob, parent in zip(tree.probs, tree.parents, strict=True) if parent == -1]
    assert halves == pytest.approx([3 / 6.5] * 2)


@pytest.mark.parametrize("branching", [2, 3, 4])
def test_a_node_has_at_most_as_many_children_as_asked_for_the_likeliest(branching: int) -> None:
    history = [[1, 2, 10 + i] for i in range(5) for _ in range(5 - i)]
    assert tree_of(history, [[1, 2]], branching).tokens == [10, 11, 12, 13][:branching]


def test_history_and_siblings_merge_under_a_common_prefix() -> None:
    history = [[1, 2, 3, 4, 5, 6]] * 3
    tree = tree_of(history, [[1, 2], [1, 2, 3, 4, 8, 9]])
    paths = tree.paths()
    assert paths.count([3]) == 1
    assert paths.count([3, 4]) == 1
    assert [3, 4, 5, 6] in paths
    assert [3, 4, 8, 9] in paths
    assert len(paths) == 6
    # The sibling's text alone, and the history's alone, give a part of it.
    assert tree_of(history, [[1, 2]]).paths() == [[3], [3, 4], [3, 4, 5], [3, 4, 5, 6]]
    assert tree_of([], [[1, 2], [1, 2, 3, 4, 8, 9]]).paths()[-1] == [3, 4, 8, 9]


def test_a_shorter_context_adds_what_the_longest_does_not_know() -> None:
    history = [[9, 1, 2, 3, 4]] + [[8, 1, 2, 5, 6]] * 4
    paths = tree_of(history, [[9, 1, 2]]).paths()
    assert [3, 4] in paths
    assert [5, 6] in paths


def test_the_source_is_that_of_the_first_token() -> None:
    tree = tree_of([[1, 2, 3, 4]] * 3, [[1, 2], [1, 2, 7]])
    assert (tree.tokens[0], tree.source, tree.match_len) == (3, "history", 3)
    tree = tree_of([], [[1, 2], [1, 2, 7], [1, 2, 7]])
    assert (tree.tokens[0], tree.source, tree.match_len) == (7, "sibling", 3)


def test_the_drafter_passes_branching_on_row_by_row() -> None:
    drafter = SuffixDrafter(index="native")
    tokens = [[1, 2, 3, 4], [1, 2, 5, 6]]
    drafter.publish(1, [HistoryRecord("p", 1, i, np.array(each, np.int32)) for i, each in enumerate(tokens)])
    uids, two = np.array([10, 11, 12]), np.full(3, 2, np.int32)
    for uid in uids.tolist():
        drafter.begin(uid, "p", np.zeros(0, np.int32))
    batch = LiveBatch(uids, two, two * 50, two)
    drafter.extend(batch, Ragged(np.array([1, 2] * 3, np.int32), np.array([0, 2, 4, 6])))
    counts = {}
    for name, branching in (("none", None), ("mixed", np.array([1, 2, 1], np.int32))):
        out = DraftBatch.empty(3, 8)
        drafter.propose(batch, Price(two * 4, np.zeros(3, np.float32), branching), out)
        counts[name] = [out.parents[row, : out.count[row]].tolist().count(-1) for row in range(3)]
    assert counts == {"none": [1, 1, 1], "mixed": [1, 2, 1]}

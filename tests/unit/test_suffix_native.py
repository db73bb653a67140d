"""The native suffix index against brute force: counts, longest matches, cursors, decay, and typed errors."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.history import HistoryLog
from slipstream.drafter.suffix_native import NativeSuffixIndexes
from slipstream.kernels import _native  # type: ignore[attr-defined]
from slipstream.kernels.live_text import START, LiveText
from tests.suffix_sets import TEXTS, Drafts, Sequences, arrays, begin, extend, publish

ESCAPE = 0.5


def occurrences(sequences: Sequences, weights: list[float], context: list[int]) -> float:
    """Summed weight of the places where the context ends."""
    n = len(context)
    return sum(
        weight
        for tokens, weight in zip(sequences, weights, strict=True)
        for end in range(n, len(tokens) + 1)
        if tokens[end - n : end] == context
    )


def followers(sequences: Sequences, weights: list[float], context: list[int]) -> dict[int, float]:
    found: defaultdict[int, float] = defaultdict(float)
    n = len(context)
    for tokens, weight in zip(sequences, weights, strict=True):
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == context:
                found[tokens[start + n]] += weight
    return dict(found)


def contexts(sequences: Sequences) -> set[tuple[int, ...]]:
    found = {tuple(s[i:j]) for s in sequences for i in range(len(s)) for j in range(i + 1, len(s) + 1)}
    return found | {(9,), (1, 9)}


events = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30)
histories = st.lists(st.lists(st.integers(0, 3), max_size=14), min_size=1, max_size=4)


def check_frozen(sequences: Sequences, weights: list[float]) -> None:
    index = _native.SuffixIndexSet()
    publish(index, "p", sequences, weights)
    started = [[START, *tokens] for tokens in sequences]
    for context in contexts(started):
        got = dict(index.follow_weights("p", list(context), False))
        assert got == pytest.approx(followers(started, weights, list(context)), rel=1e-5)


@settings(max_examples=120, deadline=None)
@given(histories, st.sampled_from([1.0, 0.9, 0.5]))
def test_frozen_weights_equal_brute_force(sequences: Sequences, decay: float) -> None:
    check_frozen(sequences, [decay ** (len(sequences) - 1 - i) for i in range(len(sequences))])


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_frozen_weights_equal_brute_force_on_hard_text(text: list[int]) -> None:
    check_frozen([text, text[7:30], text[::-1]], [0.25, 0.5, 1.0])


@settings(max_examples=120, deadline=None)
@given(events)
def test_interleaved_live_counts_equal_brute_force(pairs: list[tuple[int, int]]) -> None:
    index = _native.SuffixIndexSet()
    sequences: Sequences = [[START] for _ in range(3)]
    for uid in range(3):
        begin(index, uid, "p")
    for which, token in pairs:
        extend(index, [which], [[token]])
        sequences[which].append(token)
    for context in contexts(sequences):
        got = dict(index.follow_weights("p", list(context), True))
        assert got == followers(sequences, [1.0] * 3, list(context))


@settings(max_examples=120, deadline=None)
@given(histories, st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_cursors_find_the_longest_match_across_clones(history: Sequences, text: list[int]) -> None:
    """With one candidate, a draft from the history continues the longest context that was ever continued, by its
    heaviest follower, at w(sc) / (w(s) + escape)."""
    index = _native.SuffixIndexSet(min_match=1, max_candidates=1, escape=ESCAPE)
    publish(index, "p", history, [1.0] * len(history))
    begin(index, 0, "p")
    frozen = [[START, *tokens] for tokens in history]
    own = [START]
    for token in text:
        extend(index, [0], [[token]])
        own.append(token)
        check_draft(Drafts(index, [0], limit=1), frozen, own)


def check_draft(drafts: Drafts, frozen: Sequences, text: list[int]) -> None:
    plain = LiveText([])
    sequence = plain.open()
    for token in text[1:]:
        plain.append(sequence, token)
    live = plain.draft(sequence, 1, 1, 1, ESCAPE)
    weights = [1.0] * len(frozen)
    expected = (live.path_probs[0] if live.tokens else 0.0, live.match_len, set(live.tokens))
    for n in range(len(text), 0, -1):
        found = followers(frozen, weights, text[len(text) - n :])
        if found:
            top = max(found.values())
            prob = top / (max(occurrences(frozen, weights, text[len(text) - n :]), top) + ESCAPE)
            if prob >= expected[0]:
                expected = prob, n, {token for token in found if found[token] == top}
            break
    if not expected[2]:
        assert drafts.tokens == [[]]
        return
    assert drafts.probs[0][0] == pytest.approx(expected[0])
    assert drafts.match_len[0] == expected[1]
    assert drafts.tokens[0][0] in expected[2]


def test_one_symbol_of_150k_stays_linear() -> None:
    count = 150_000
    index = _native.SuffixIndexSet()
    publish(index, "p", [[5] * count], [1.0])
    assert dict(index.follow_weights("p", [5, 5], False)) == {5: count - 2}
    begin(index, 1, "p")
    extend(index, [1], [[5] * count])
    assert Drafts(index, [1], limit=8).tokens == [[5] * 8]
    stats = index.stats()
    assert (stats["frozen_tokens"], stats["live_tokens"]) == (count, count)
    # Runs of the symbol exist with and without the start before them: two states of 32 bytes a token of history.
    assert stats["frozen_bytes"] + stats["live_bytes"] < 80 * 2 * count


def test_many_branches_are_found_again() -> None:
    """Enough followers of one token for the scanned, the hashed and the grown edge table."""
    index = _native.SuffixIndexSet(min_match=1)
    text = [token for i in range(1, 3000) for token in (0, i)]
    publish(index, "p", [text], [1.0])
    begin(index, 1, "p")
    extend(index, [1], [text])
    for live in (False, True):
        assert dict(index.follow_weights("p", [0], live)) == dict.fromkeys(range(1, 3000), 1.0)
        assert dict(index.follow_weights("p", [0, 777], live)) == {0: 1.0}
        assert index.follow_weights("p", [0, 3001], live) == []


def test_the_tier_that_promises_more_drafts() -> None:
    index = _native.SuffixIndexSet()
    publish(index, "p", [[1, 2, 3, 4, 5, 6]] * 4, [1.0] * 4)
    for uid in (1, 2):
        begin(index, uid, "p")
    assert Drafts(index, [1], limit=4).tokens == [[1, 2, 3, 4]]
    extend(index, [1, 2], [[7, 8, 9, 1, 2], [7, 8]])
    drafts = Drafts(index, [1, 2], limit=8)
    assert drafts.tokens == [[3, 4, 5, 6], [9, 1, 2]]
    assert drafts.source == ["history", "sibling"]
    assert drafts.probs[0] == sorted(drafts.probs[0], reverse=True)
    cut = Drafts(index, [1], limit=8, min_prob=drafts.probs[0][1] * 0.999)
    assert cut.tokens == [[3, 4]]


def test_drafts_depend_on_neither_the_row_nor_the_rest_of_the_batch() -> None:
    rng = np.random.default_rng(4)
    history = [rng.integers(0, 5, 200).tolist() for _ in range(4)]
    indexes = [_native.SuffixIndexSet() for _ in range(2)]
    texts = [rng.integers(0, 5, 50).tolist() for _ in range(6)]
    for index in indexes:
        publish(index, "p", history, [1.0] * 4)
        for uid in range(6):
            begin(index, uid, f"{'p' if uid else 'q'}")
    for at in range(50):
        extend(indexes[0], list(range(6)), [[text[at]] for text in texts])
        for uid in range(6):
            extend(indexes[1], [uid], [[texts[uid][at]]])
        together = Drafts(indexes[0], list(range(6)), limit=6)
        turned = Drafts(indexes[1], list(reversed(range(6))), limit=6)
        for uid in range(6):
            alone = Drafts(indexes[1], [uid], limit=6)
            assert alone.tokens[0] == together.tokens[uid] == turned.tokens[5 - uid]
            assert alone.probs[0] == together.probs[uid] == turned.probs[5 - uid]
            assert alone.match_len[0] == together.match_len[uid]


def test_errors_are_typed_and_change_nothing() -> None:
    index = _native.SuffixIndexSet()
    publish(index, "p", [[1, 2, 3]], [1.0])
    for uid in (1, 2):
        begin(index, uid, "p")
    extend(index, [1, 2], [[1], [1]])
    before = (Drafts(index, [1, 2], limit=4).tokens, index.stats())
    with pytest.raises(ValueError, match="token -3 is negative"):
        extend(index, [1, 2], [[2], [-3]])
    with pytest.raises(_native.UnknownUidError, match="uid 9 is not open"):
        extend(index, [1, 9], [[2], [2]])
    with pytest.raises(ValueError, match="uid 2 is in the batch twice"):
        extend(index, [1, 2, 2], [[2], [2], [2]])
    with pytest.raises(KeyError, match="uid 9"):
        Drafts(index, [1, 9], limit=4)
    with pytest.raises(KeyError, match="uid 9"):
        index.end(9)
    with pytest.raises(ValueError, match="uid 1 is open already"):
        begin(index, 1, "other")
    with pytest.raises(ValueError, match="offsets"):
        index.extend(np.array([1]), np.array([2], np.int32), np.array([0, 2]))
    with pytest.raises(ValueError, match="negative"):
        publish(index, "p", [[4, -1]], [1.0])
    with pytest.raises(ValueError, match="weights"):
        publish(index, "p", [[4]], [0.0])
    with pytest.raises(ValueError, match="min_match"):
        _native.SuffixIndexSet(min_match=0)
    assert (Drafts(index, [1, 2], limit=4).tokens, index.stats()) == before


def test_a_closed_index_refuses() -> None:
    index = _native.SuffixIndexSet()
    begin(index, 1, "p")
    Drafts(index, [1], limit=2)
    index.close()
    for call in (
        lambda: begin(index, 2, "p"),
        lambda: index.end(1),
        lambda: extend(index, [1], [[2]]),
        lambda: Drafts(index, [1], limit=2),
        lambda: publish(index, "p", [[2]], [1.0]),
    ):
        with pytest.raises(_native.ClosedIndexError, match="closed"):
            call()


def test_a_request_keeps_the_tier_it_began_with() -> None:
    index = _native.SuffixIndexSet()
    publish(index, "p", [[1, 2, 3]] * 3, [1.0] * 3)
    begin(index, 1, "p")
    rng = np.random.default_rng(0)
    noise = rng.integers(10, 20, 200_000).tolist()
    values, offsets = arrays([[4, 5, 6]] * 9 + [noise])
    index.publish("p", values, offsets, np.ones(10, np.float32), np.ones(10, np.uint8))
    while_building = Drafts(index, [1], limit=3).tokens
    begin(index, 2, "p")  # waits for the rebuild of its prompt
    assert Drafts(index, [1, 2], limit=3).tokens == [*while_building, [4, 5, 6]]
    assert while_building == [[1, 2, 3]]


def test_readers_run_while_prompts_are_rebuilt() -> None:
    """Requests that stay open across many rebuilds draft exactly what they drafted before."""
    index = _native.SuffixIndexSet()
    rng = np.random.default_rng(1)
    history = [rng.integers(0, 4, 400).tolist() for _ in range(3)]
    publish(index, "p", history, [1.0] * 3)
    uids = list(range(8))
    for uid in uids:
        begin(index, uid, "p")
    extend(index, uids, [rng.integers(0, 4, 30).tolist() for _ in uids])
    before = Drafts(index, uids, limit=8).tokens
    stop = threading.Event()
    failures: list[BaseException] = []

    def rebuild() -> None:
        try:
            while not stop.is_set():
                publish(index, "p", [rng.integers(0, 4, 3000).tolist()], [1.0])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=rebuild)
    thread.start()
    try:
        for i in range(300):
            assert Drafts(index, uids, limit=8).tokens == before
            begin(index, 100 + i, "p")
            extend(index, [100 + i], [[1, 2, 3]])
            index.end(100 + i)
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert index.stats()["open_requests"] == len(uids)


def test_least_recently_begun_prompts_are_dropped_and_come_back() -> None:
    history = HistoryLog(window_epochs=4)
    history.add(HistoryRecord(name, 1, i, np.arange(100, dtype=np.int32)) for i, name in enumerate("abc"))
    indexes = NativeSuffixIndexes(history, min_match=2, decay=0.9, escape=0.5, max_index_tokens=250)
    none = np.zeros(0, np.int32)
    indexes.begin(1, "a", none)
    for uid, name in ((2, "b"), (3, "c")):
        indexes.begin(uid, name, none)
        indexes.end(uid, finished=True)
    indexes.begin(4, "a", none)
    assert indexes.follow_weights("a", [5]) == {6: 1.0}
    assert indexes.follow_weights("b", [5]) == {}
    assert indexes.follow_weights("c", [5]) == {6: 1.0}
    indexes.begin(5, "b", none)
    assert indexes.follow_weights("b", [5]) == {6: 1.0}
    assert indexes.follow_weights("c", [5]) == {}


def test_visits_fade_exactly_in_the_frozen_tier() -> None:
    history = HistoryLog(window_epochs=3)
    indexes = NativeSuffixIndexes(history, min_match=2, decay=0.5, escape=0.5, max_index_tokens=10**6)
    indexes.begin(1, "p", np.array([5, 1], np.int32))
    for step in (1, 2, 3, 4):
        records = [HistoryRecord("p", step, step, np.array([5, step], np.int32))]
        history.add(records)
        indexes.publish(records)
    assert indexes.follow_weights("p", [5]) == {2: 0.25, 3: 0.5, 4: 1.0}

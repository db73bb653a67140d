"""The text that all prompts share: real continuations only, the majority's, only where a prompt knows little itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import SOURCE_NAMES, DraftBatch, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.kernels import _native  # type: ignore[attr-defined]

MAX_MATCH = 16  # kRecent in kernels/csrc/shared_text.h
FIRST_TOO_LARGE = 2**24 - 1  # kGap
SHARED_BELOW = 1.0
ENOUGH = 4  # occurrences of a text with which none of its contexts goes without a place

Sequences = list[list[int]]
texts = st.lists(st.lists(st.integers(0, 3), max_size=24), max_size=5)
contexts = st.lists(st.integers(0, 3), max_size=20)


def arrays(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    return np.array([token for tokens in sequences for token in tokens], np.int32), np.cumsum([0, *map(len, sequences)])


def make_index(shared: Sequences, requests: Sequences, min_match: int = 2) -> _native.SuffixIndexSet:
    """Every request belongs to another prompt, about which nothing is known."""
    index = _native.SuffixIndexSet(min_match=min_match)
    if shared:
        index.publish_shared(*arrays(shared))
        index.wait()
    open_requests(index, requests)
    return index


def open_requests(index: _native.SuffixIndexSet, requests: Sequences) -> None:
    for uid, text in enumerate(requests):
        index.begin(uid, f"prompt {uid}", np.zeros(0, np.int32))
        index.extend(np.array([uid]), *arrays([text]))


@dataclass(frozen=True)
class Draft:
    tokens: list[int]
    probs: list[float]
    source: str
    match_len: int


def drafts_of(index: _native.SuffixIndexSet, count: int, limit: int = 8, min_prob: float = 0.0) -> list[Draft]:
    out, limits = DraftBatch.empty(count, limit), np.full(count, limit, np.int32)
    index.propose(
        *(np.arange(count), limits, np.full(count, min_prob, np.float32), np.ones(count, np.int32)),
        *(out.tokens, out.count, out.source, out.age, out.match_len, out.probs, out.cells, out.parents),
    )
    found = []
    for row, n in enumerate(out.count.tolist()):
        assert out.parents[row, :n].tolist() == list(range(-1, n - 1))
        tokens, probs = out.tokens[row, :n].tolist(), out.probs[row, :n].tolist()
        found.append(Draft(tokens, probs, SOURCE_NAMES[out.source[row]], int(out.match_len[row])))
    return found


def draft_of(shared: Sequences, text: list[int], limit: int = 8) -> Draft:
    return drafts_of(make_index(shared, [text]), 1, limit)[0]


def occurs(text: list[int], sequences: Sequences) -> bool:
    return any(text == s[i : i + len(text)] for s in sequences for i in range(len(s) - len(text) + 1))


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(contexts, min_size=1, max_size=4), st.sampled_from([1, 2, 3, 4, 5]))
def test_drafts_are_true_continuations(shared: Sequences, requests: Sequences, min_match: int) -> None:
    """The draft, with all the context that it says matched, stands in one sequence of the shared text."""
    with_text = drafts_of(make_index(shared, requests, min_match), len(requests))
    without = drafts_of(make_index([], requests, min_match), len(requests))
    for text, draft, own in zip(requests, with_text, without, strict=True):
        if draft.source != "shared":
            assert draft == own
            continue
        assert sum(own.probs) < min(SHARED_BELOW, sum(draft.probs))
        assert max(2, min_match) <= draft.match_len <= min(MAX_MATCH, len(text))
        assert occurs(text[-draft.match_len :] + draft.tokens, shared)
        assert all(0.0 <= prob < 1.0 for prob in draft.probs)
        assert draft.probs == sorted(draft.probs, reverse=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 8))
def test_a_known_context_is_continued_to_the_end_of_its_sequence(before: int, after: int, limit: int) -> None:
    text = list(range(before + after))
    shared = [text, [90, 91, 92]] * ENOUGH
    draft = draft_of(shared, text[:before], limit)
    assert draft.tokens == text[before : before + limit]
    assert (draft.source, draft.match_len) == ("shared", min(before, MAX_MATCH))


def test_nothing_reaches_across_sequences() -> None:
    shared = [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    assert draft_of(shared, [2, 3]).tokens == []
    assert draft_of(shared, [3, 4]).tokens == []
    assert draft_of(shared, [3, 4, 5]).tokens == [6]
    assert draft_of(shared, [7]).tokens == []
    # A match may not reach into the sequence before, though the tokens agree.
    assert draft_of(shared, [2, 3, 7, 8]).match_len == 2


@pytest.mark.parametrize("odd_at", range(4))
@pytest.mark.parametrize("odd", [[1, 2, 9, 8, 7], [1, 2, 3, 9, 5], [6, 2, 3, 4, 9]])
def test_the_majority_wins_over_one_odd_occurrence(odd: list[int], odd_at: int) -> None:
    shared = [[1, 2, 3, 4, 5] for _ in range(3)]
    shared.insert(odd_at, odd)
    draft = draft_of(shared, [1, 2])
    assert draft.tokens == [3, 4, 5]
    assert draft.probs[0] > 0.5


def test_the_context_that_promises_more_drafts() -> None:
    """A long context that was met once yields to a short one that goes on for longer."""
    shared = [[1, 2, 3, 4, 9], *([7, 3, 4, 5, 6, 7, 8] for _ in range(3))]
    draft = draft_of(shared, [1, 2, 3, 4])
    assert (draft.tokens, draft.source, draft.match_len) == ([5, 6, 7, 8], "shared", 2)
    only_long = draft_of([[1, 2, 3, 4, 9, 10, 11], [7, 3, 4, 5]], [1, 2, 3, 4])
    assert (only_long.tokens, only_long.match_len) == ([9, 10, 11], 4)


def test_own_text_that_promises_enough_is_left_alone() -> None:
    shared = [[1, 2, 30, 31, 32, 33, 34, 35]] * 50
    index = make_index(shared, [[1, 2]])
    assert drafts_of(index, 1)[0].source == "shared"
    index.publish("prompt 1", *arrays([[1, 2, 3, 4, 5]] * 9), np.ones(9, np.float32), np.ones(9, np.uint8))
    index.begin(1, "prompt 1", np.zeros(0, np.int32))
    index.extend(np.array([1]), *arrays([[1, 2]]))
    strange, known = drafts_of(index, 2)
    assert (strange.tokens[0], strange.source) == (30, "shared")
    assert (known.tokens, known.source) == ([3, 4, 5], "history")
    assert sum(known.probs) > SHARED_BELOW
    # Cut to one token, the own text promises less than 1 and the shared text more than that.
    assert [draft.source for draft in drafts_of(index, 2, limit=1)] == ["shared", "shared"]


def test_the_price_holds_for_shared_text_too() -> None:
    index = make_index([[1, 2, 3, 4, 5, 6]] * 3, [[1, 2]])
    free = drafts_of(index, 1)[0]
    cut = drafts_of(index, 1, min_prob=free.probs[1])[0]
    assert (cut.tokens, cut.probs) == (free.tokens[:2], free.probs[:2])
    assert drafts_of(index, 1, min_prob=0.99)[0].source == "none"


def test_tokens_that_are_too_large_are_refused_and_change_nothing() -> None:
    index = make_index([[1, 2, FIRST_TOO_LARGE - 1, 4]], [[1, 2]])
    before = (drafts_of(index, 1), index.stats())
    assert before[0][0].tokens == [FIRST_TOO_LARGE - 1, 4]
    for bad in (FIRST_TOO_LARGE, FIRST_TOO_LARGE + 1, 2**31 - 1):
        with pytest.raises(ValueError, match=f"token {bad} is too large for the shared text"):
            index.publish_shared(*arrays([[1, 2, 3], [bad]]))
    with pytest.raises(ValueError, match="negative"):
        index.publish_shared(*arrays([[1, -1]]))
    with pytest.raises(ValueError, match="offsets"):
        index.publish_shared(np.array([1, 2], np.int32), np.array([0, 1]))
    index.wait()
    assert (drafts_of(index, 1), index.stats()) == before
    # A request may hold such tokens: they match nothing.
    assert drafts_of(make_index([[1, 2, 3]], [[FIRST_TOO_LARGE + 2, 2]]), 1)[0].tokens == []


def test_a_written_text_drafts_the_same_where_it_is_attached(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    shared = [rng.integers(0, 6, 200).tolist() for _ in range(5)]
    requests = [rng.integers(0, 6, 12).tolist() for _ in range(40)]
    path = str(tmp_path / "text.shared")
    writer, reader = (_native.SuffixIndexSet(min_match=2) for _ in range(2))
    writer.publish_shared(*arrays(shared), path)
    writer.publish("p", *arrays(shared), np.ones(5, np.float32), np.ones(5, np.uint8), str(tmp_path / "p.index"))
    writer.wait()
    reader.attach_shared(path)
    for index in (writer, reader):
        open_requests(index, requests)
    assert drafts_of(reader, 40) == drafts_of(writer, 40)
    assert sum(draft.source == "shared" for draft in drafts_of(reader, 40)) >= 10
    with pytest.raises(_native.BadIndexFileError, match="no index of this kind"):
        reader.attach_shared(str(tmp_path / "p.index"))
    Path(path).unlink()
    assert drafts_of(reader, 40) == drafts_of(writer, 40)


def test_every_context_of_a_text_without_repetition_is_known() -> None:
    text = list(range(1024))
    index = make_index([text], [text[i : i + 2] for i in range(0, 1022, 2)])
    found = sum(draft.tokens[:1] == [2 * i + 2] for i, draft in enumerate(drafts_of(index, 511)))
    assert found > 0.9 * 511


def suffix_drafter(shared_tokens: int = 10_000) -> SuffixDrafter:
    return SuffixDrafter(min_match=2, index="native", shared_tokens=shared_tokens)


def record(prompt_id: str, step: int, tokens: list[int]) -> HistoryRecord:
    return HistoryRecord(prompt_id, step, 1000 * step + tokens[0], np.array(tokens, np.int32))


def cold_draft(drafter: SuffixDrafter, uid: int, text: list[int]) -> tuple[list[int], str]:
    """Of a request of a prompt that nobody has seen."""
    drafter.follow_weights("any", [])  # waits for rebuilds
    drafter.begin(uid, f"new {uid}", np.array([70, 71], np.int32))
    one = np.ones(1, np.int32)
    batch = LiveBatch(np.array([uid]), one * len(text), one * 100, one * (2 + len(text)))
    drafter.extend(batch, Ragged(*arrays([text])))
    out = DraftBatch.empty(1, 8)
    drafter.propose(batch, Price(one * 8, np.zeros(1, np.float32)), out)
    return out.tokens[0, : out.count[0]].tolist(), SOURCE_NAMES[out.source[0]]


def test_a_new_prompt_starts_with_what_other_prompts_wrote() -> None:
    records = [record("a", 1, [1, 2, 3, 4, 5]), record("b", 1, [11, 12, 13])]
    drafter, alone = suffix_drafter(), suffix_drafter(shared_tokens=0)
    for each in (drafter, alone):
        each.publish(1, records)
    assert cold_draft(drafter, 1, [1, 2]) == ([3, 4, 5], "shared")
    assert cold_draft(drafter, 2, [11, 12]) == ([13], "shared")
    assert cold_draft(alone, 1, [1, 2]) == ([], "none")


def test_the_newest_rollouts_are_kept() -> None:
    drafter = suffix_drafter(30 * ENOUGH + 9)
    for step in range(1, 7):
        drafter.publish(step, [record(f"prompt {step}", step, list(range(100 * step, 100 * step + 10)))] * ENOUGH)
    known = [step for step in range(1, 7) if cold_draft(drafter, step, [100 * step, 100 * step + 1])[0]]
    assert known == [3, 4, 5, 6]  # of step 3, what fits


def test_a_long_run_rebuilds_the_text_only_when_a_share_of_it_is_new() -> None:
    drafter = suffix_drafter()
    drafter.publish(1, [record("a", 1, list(range(100)))] * ENOUGH)
    drafter.publish(2, [record("b", 2, list(range(200, 210)))] * ENOUGH)
    assert cold_draft(drafter, 1, [200, 201])[0] == []
    drafter.publish(3, [record("c", 3, list(range(300, 315)))] * ENOUGH)
    assert cold_draft(drafter, 2, [200, 201])[0] == list(range(202, 210))

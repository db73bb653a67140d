"""What every drafter must do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from slipstream.drafter.base import SOURCE_NAMES, DraftBatch, Drafter, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.history import HistoryLog
from slipstream.drafter.ngram import NgramDrafter
from slipstream.drafter.suffix import IndexChoice, SuffixDrafter

INDEXES = ("native", "reference")
DRAFTERS: list[Callable[[], Drafter]] = [*(partial(SuffixDrafter, index=index) for index in INDEXES), NgramDrafter]
PROMPT = np.array([7, 8, 9], np.int32)
TEXT = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]


def live(uids: list[int], generated: int) -> LiveBatch:
    rows = len(uids)
    return LiveBatch(
        uids=np.array(uids),
        num_generated=np.full(rows, generated, np.int32),
        num_remaining=np.full(rows, 100, np.int32),
        context_len=np.full(rows, generated + len(PROMPT), np.int32),
    )


def price(rows: int, limit: int, min_prob: float = 0.0) -> Price:
    return Price(np.full(rows, limit, np.int32), np.full(rows, min_prob, np.float32))


def feed(drafter: Drafter, uid: int, tokens: list[int]) -> None:
    for i, token in enumerate(tokens):
        drafter.extend(live([uid], i), Ragged(np.array([token], np.int32), np.array([0, 1])))


def propose(drafter: Drafter, uids: list[int], generated: int, limit: int, min_prob: float = 0.0) -> DraftBatch:
    out = DraftBatch.empty(len(uids), 16)
    drafter.propose(live(uids, generated), price(len(uids), limit, min_prob), out)
    return out


@pytest.mark.parametrize("make", DRAFTERS)
def test_repeated_text_is_continued(make: Callable[[], Drafter]) -> None:
    drafter = make()
    assert isinstance(drafter, Drafter)
    drafter.begin(1, "p", PROMPT)
    feed(drafter, 1, TEXT)
    out = propose(drafter, [1], len(TEXT), 4)
    assert out.tokens[0, : out.count[0]].tolist() == [1, 2, 3, 4]
    assert SOURCE_NAMES[out.source[0]] == "self"
    assert out.match_len[0] >= 2


@pytest.mark.parametrize("make", DRAFTERS)
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit_holds(make: Callable[[], Drafter], limit: int) -> None:
    drafter = make()
    drafter.begin(1, "p", PROMPT)
    feed(drafter, 1, TEXT)
    assert propose(drafter, [1], len(TEXT), limit).count[0] == limit


@pytest.mark.parametrize("make", DRAFTERS)
def test_requests_are_opened_once_and_closed(make: Callable[[], Drafter]) -> None:
    drafter = make()
    drafter.begin(1, "p", PROMPT)
    with pytest.raises(ValueError, match="uid 1"):
        drafter.begin(1, "p", PROMPT)
    drafter.end(1, finished=True)
    with pytest.raises(KeyError):
        propose(drafter, [1], 0, 4)
    drafter.begin(1, "p", PROMPT)


@pytest.mark.parametrize("index", INDEXES)
def test_siblings_in_flight_draft_for_each_other(index: IndexChoice) -> None:
    drafter = SuffixDrafter(index=index)
    for uid in (1, 2):
        drafter.begin(uid, "p", PROMPT)
    feed(drafter, 1, [5, 6, 7, 8])
    feed(drafter, 2, [5, 6])
    out = propose(drafter, [2], 2, 8)
    # After its sibling's last token, the native index goes on where the prompt does.
    assert out.tokens[0, : out.count[0]].tolist() in ([7, 8], [7, 8, 9])
    assert SOURCE_NAMES[out.source[0]] == "sibling"


@pytest.mark.parametrize("index", INDEXES)
def test_history_drafts_from_the_first_token_of_its_own_prompt_only(index: IndexChoice) -> None:
    drafter = SuffixDrafter(index=index)
    drafter.publish(1, [HistoryRecord("p", 1, 10, np.array([5, 6, 7], np.int32))])
    for uid, prompt in ((1, "p"), (2, "other")):
        drafter.begin(uid, prompt, PROMPT)
    out = propose(drafter, [1, 2], 0, 8)
    assert out.tokens[0, : out.count[0]].tolist() == [5, 6, 7]
    assert SOURCE_NAMES[out.source[0]] == "history"
    assert out.count[1] == 0


@pytest.mark.parametrize("index", INDEXES)
def test_newer_visits_outweigh_older_ones(index: IndexChoice) -> None:
    drafter = SuffixDrafter(decay=0.5, index=index)
    drafter.begin(1, "p", PROMPT)  # the index exists: records join it one visit after the other
    for step, tokens in ((1, [5, 6]), (2, [5, 7]), (3, [5, 8])):
        drafter.publish(step, [HistoryRecord("p", step, 100 + step, np.array(tokens, np.int32))])
    drafter.begin(2, "p", PROMPT)
    feed(drafter, 2, [5])
    assert propose(drafter, [2], 1, 1).tokens[0, 0] == 8


@pytest.mark.parametrize("index", INDEXES)
def test_own_rollouts_do_not_join_twice(index: IndexChoice) -> None:
    """Live tokens are in the index already when publish brings the same rollout back."""
    drafter = SuffixDrafter(index=index)
    drafter.begin(1, "p", PROMPT)
    feed(drafter, 1, [5, 6])
    drafter.end(1, finished=True)
    other = HistoryRecord("p", 1, 2, np.array([5, 9], np.int32))
    mine = HistoryRecord("p", 1, 1, np.array([5, 6], np.int32))
    drafter.publish(1, [mine, other])
    weights = drafter.follow_weights("p", [5])
    assert weights[6] == weights[9]


@pytest.mark.parametrize("index", INDEXES)
def test_uncertain_tokens_are_left_out_where_they_are_dear(index: IndexChoice) -> None:
    drafter = SuffixDrafter(index=index)
    records = [HistoryRecord("p", 1, i, np.array([5, 6, 7 + i % 2], np.int32)) for i in range(8)]
    drafter.publish(1, records)
    drafter.begin(99, "p", PROMPT)
    assert propose(drafter, [99], 0, 8, min_prob=0.2).count[0] == 3
    assert propose(drafter, [99], 0, 8, min_prob=0.7).count[0] == 2


@pytest.mark.parametrize("index", INDEXES)
def test_the_window_forgets(index: IndexChoice) -> None:
    log = HistoryLog(window_epochs=2)
    for step in (1, 2, 3):
        log.add([HistoryRecord("p", step, step, np.array([step], np.int32))])
    assert [records[0].step for records in log.visits("p")] == [2, 3]
    drafter = SuffixDrafter(window_epochs=1, index=index)
    drafter.begin(1, "p", PROMPT)
    drafter.end(1, finished=False)
    for step in (1, 2, 3):
        drafter.publish(step, [HistoryRecord("p", step, step, np.array([5, step], np.int32))])
    drafter.begin(2, "p", PROMPT)
    feed(drafter, 2, [5])
    assert propose(drafter, [2], 1, 1).tokens[0, 0] == 3
    assert set(drafter.follow_weights("p", [5])) == {3}


@pytest.mark.parametrize("make", DRAFTERS)
def test_an_estimate_is_a_probability_or_missing(make: Callable[[], Drafter]) -> None:
    drafter = make()
    drafter.begin(1, "p", PROMPT)
    feed(drafter, 1, TEXT)
    out = propose(drafter, [1], len(TEXT), 4)
    estimates = out.probs[0, : out.count[0]]
    assert np.isnan(estimates).all() == isinstance(drafter, NgramDrafter)
    assert (np.isnan(estimates) | ((estimates > 0.0) & (estimates <= 1.0))).all()

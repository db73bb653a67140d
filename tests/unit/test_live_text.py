"""The live tier of the native suffix index against its plain twin, and what it finds among much text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.kernels import _native  # type: ignore[attr-defined]
from slipstream.kernels.live_text import MAX_PLACES, PROMPT_SEQUENCE, LiveText
from tests.suffix_sets import TEXTS, Drafts, begin, extend

ESCAPE = 0.5

events = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(events, st.lists(st.integers(0, 3), max_size=6), st.integers(1, 3), st.integers(1, 3))
def test_live_drafts_equal_the_plain_tier(
    pairs: list[tuple[int, int]], prompt: list[int], min_match: int, max_candidates: int
) -> None:
    """Every token, probability, match length and source, after every token."""
    check_live(prompt, [(which, [token]) for which, token in pairs], min_match, max_candidates)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_live_drafts_equal_the_plain_tier_on_hard_text(text: list[int]) -> None:
    """Three copies, at different paces, over several pages."""
    long = text * 4
    parts = [(i % 3, long[first : first + 7]) for first in range(0, len(long), 7) for i in range(3)]
    check_live([], [part for i, part in enumerate(parts) if i % 5], 1, 2)


def check_live(prompt: list[int], parts: list[tuple[int, list[int]]], min_match: int, max_candidates: int) -> None:
    index = _native.SuffixIndexSet(min_match=min_match, max_candidates=max_candidates, escape=ESCAPE)
    plain = LiveText(prompt)
    sequences = []
    for uid in range(3):
        begin(index, uid, "p", tuple(prompt))
        sequences.append(plain.open())
    for which, tokens in parts:
        extend(index, [which], [tokens])
        for token in tokens:
            plain.append(sequences[which], token)
        drafts = Drafts(index, [0, 1, 2], limit=9)
        for row in range(3):
            expected = plain.draft(sequences[row], 9, min_match, max_candidates, ESCAPE)
            assert drafts.tokens[row] == expected.tokens
            assert drafts.probs[row] == pytest.approx(expected.path_probs, rel=1e-5)
            if expected.tokens:
                assert drafts.match_len[row] == expected.match_len
                own, from_prompt = sequences[row], PROMPT_SEQUENCE
                source = {own: "self", from_prompt: "prompt"}.get(expected.sequence, "sibling")
                assert drafts.source[row] == source


def test_the_longest_match_is_found_among_the_latest_places() -> None:
    """Newer places of the same pair do not hide a longer match, as long as they are few."""
    index = _native.SuffixIndexSet(max_candidates=1)
    for uid in range(10):
        begin(index, uid, "p")
    extend(index, [0], [[1, 2, 3, 4, 5, 6]])
    for uid in range(1, 1 + MAX_PLACES - 2):
        extend(index, [uid], [[10 + uid, 3, 4, 7, 8]])
    extend(index, [9], [[1, 2, 3, 4]])
    drafts = Drafts(index, [9], limit=1)
    assert (drafts.tokens, drafts.match_len) == ([[5]], [5])
    for uid in (7, 8):
        extend(index, [uid], [[10 + uid, 3, 4, 7, 8]])
    assert Drafts(index, [9], limit=1).tokens == [[7]]


def test_text_is_found_again_after_the_table_has_grown() -> None:
    index = _native.SuffixIndexSet(min_match=3, max_candidates=1)
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, 300, 5_000).tolist() for _ in range(3)]
    for uid, text in enumerate(texts):
        begin(index, uid, "p")
        extend(index, [uid], [text])
    begin(index, 9, "p")
    for text in texts:
        for at in range(0, 4_900, 350):
            extend(index, [9], [text[at : at + 4]])
            assert Drafts(index, [9], limit=4).tokens == [text[at + 4 : at + 8]]


def test_a_batch_is_written_as_its_rows_are() -> None:
    """Rows of several prompts in one call, much and little text a row, past the growth of every prompt's table."""
    rng = np.random.default_rng(6)
    together, apart = (_native.SuffixIndexSet() for _ in range(2))
    uids = list(range(12))
    for uid in uids:
        for index in (together, apart):
            begin(index, uid, f"p{uid % 3}")
    phrases = [rng.integers(0, 5_000, 40).tolist() for _ in range(30)]
    for step in range(60):
        parts = [
            [token for _ in range(int(rng.integers(0, 4))) for token in phrases[int(rng.integers(30))]] for _ in uids
        ]
        extend(together, uids, parts)
        for row in np.argsort([uid % 3 for uid in uids], kind="stable").tolist():
            extend(apart, [uids[row]], [parts[row]])
        if step % 10 == 9:
            a, b = (Drafts(index, uids, limit=8) for index in (together, apart))
            assert (a.tokens, a.probs, a.match_len) == (b.tokens, b.probs, b.match_len)
    assert together.stats()["live_tokens"] == apart.stats()["live_tokens"] > 3 * 8192

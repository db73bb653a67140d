"""The plain index against brute force, with sequences that grow interleaved."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.kernels.suffix_index import MAX_CHAIN, SuffixIndex


def brute_follow(sequences: list[list[int]], context: list[int]) -> Counter:
    found: Counter = Counter()
    n = len(context)
    for tokens in sequences:
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == context:
                found[tokens[start + n]] += 1
    return found


def build(events: list[tuple[int, int]], num: int) -> tuple[SuffixIndex, list[list[int]]]:
    index, sequences = SuffixIndex(), [[] for _ in range(num)]
    for _ in range(num):
        index.open_sequence()
    for which, token in events:
        index.append(which, token)
        sequences[which].append(token)
    return index, sequences


events = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=MAX_CHAIN - 1)


@settings(max_examples=150, deadline=None)
@given(events)
def test_counts_equal_brute_force(pairs: list[tuple[int, int]]) -> None:
    index, sequences = build(pairs, 3)
    contexts = {tuple(s[i:j]) for s in sequences for i in range(len(s)) for j in range(i, len(s) + 1)} | {
        (9,),
        (),
    }
    for context in contexts:
        assert index.follow_weights(list(context)) == dict(brute_follow(sequences, list(context)))


@settings(max_examples=150, deadline=None)
@given(events)
def test_continuation_starts_at_the_longest_continued_match(pairs: list[tuple[int, int]]) -> None:
    index, sequences = build(pairs, 3)
    for which, tokens in enumerate(sequences):
        longest = next(
            (n for n in range(len(tokens), -1, -1) if brute_follow(sequences, tokens[len(tokens) - n :])),
            None,
        )
        draft = index.continuation(which, max_tokens=4, min_match=0)
        if longest is None:
            assert draft is None
            continue
        assert draft is not None
        assert draft.match_len == longest
        follow = brute_follow(sequences, tokens[len(tokens) - longest :])
        assert follow[draft.tokens[0]] == max(follow.values())
        assert draft.path_probs[0] == pytest.approx(max(follow.values()) / sum(follow.values()))


@pytest.mark.parametrize("text", [[0] * 300, [0, 1] * 150, [0, 1, 1] * 100], ids=["unary", "pair", "triple"])
def test_periodic_text_is_continued_by_its_period(text: list[int]) -> None:
    index, _ = build([(0, t) for t in text], 1)
    period = 3 if len(set(text[:3])) > 1 and text[1] == text[2] else len(set(text))
    draft = index.continuation(0, max_tokens=12)
    assert draft is not None
    assert draft.tokens == [text[(len(text) + i) % period] for i in range(len(draft.tokens))]


def test_weights_decide_and_min_prob_cuts() -> None:
    index = SuffixIndex()
    for tokens, weight in (([1, 2, 3], 1.0), ([1, 2, 4], 3.0)):
        sequence = index.open_sequence(weight)
        for token in tokens:
            index.append(sequence, token)
    mine = index.open_sequence()
    index.append(mine, 1)
    draft = index.continuation(mine, max_tokens=5)
    assert draft is not None
    assert draft.tokens == [2, 4]
    assert draft.path_probs == pytest.approx([1.0, 0.75])
    cut = index.continuation(mine, max_tokens=5, min_prob=0.8)
    assert cut is not None
    assert cut.tokens == [2]

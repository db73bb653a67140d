"""The plain suffix index: a generalised suffix automaton in Python lists and dicts.

It is the specification of the drafter's index: exact, unbounded match length, one automaton over many sequences that
may grow interleaved (siblings in flight).

Invariants
- Every state stands for the substrings that end at the same places; `_length` is the longest of them, `_link` the
  state of the longest proper suffix that occurs elsewhere too.
- `_follow[s][c]` is the summed weight of the occurrences of s's substrings that are followed by c (a state that is
  cloned hands its counts to the clone). Suffix-link chains longer than MAX_CHAIN are cut, so on strongly periodic
  text the counts of very short contexts fall behind; matches are never wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

ROOT = 0
MAX_CHAIN = 32


@dataclass(frozen=True, slots=True)
class Continuation:
    """A draft: tokens, the estimated probability that all of them up to each are right, the length of the context
    matched, and the sequence that last took the first step."""

    tokens: list[int]
    path_probs: list[float]
    match_len: int
    sequence: int


class SuffixIndex:
    """Sequences of tokens, each open for appending; `continuation` drafts what most often followed."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]
        self._length: list[int] = [0]
        self._follow: list[dict[int, float]] = [{}]
        self._latest: list[dict[int, int]] = [{}]
        self._last: list[int] = []
        self._weight: list[float] = []
        self.num_tokens = 0

    @property
    def num_sequences(self) -> int:
        """Sequences opened so far; ids run from 0."""
        return len(self._last)

    def open_sequence(self, weight: float = 1.0) -> int:
        """Starts a sequence whose occurrences count `weight` each; returns its id."""
        self._last.append(ROOT)
        self._weight.append(weight)
        return len(self._last) - 1

    def append(self, sequence: int, token: int) -> None:
        """Extends a sequence by one token; amortised constant time."""
        at = self._last[sequence]
        self._count(at, token, sequence)
        self._last[sequence] = self._step(at, token)
        self.num_tokens += 1

    def _count(self, state: int, token: int, sequence: int) -> None:
        weight = self._weight[sequence]
        for _ in range(MAX_CHAIN):
            follow = self._follow[state]
            follow[token] = follow.get(token, 0.0) + weight
            self._latest[state][token] = sequence
            state = self._link[state]
            if state < 0:
                return

    def _step(self, at: int, token: int) -> int:
        known = self._next[at].get(token)
        if known is not None:
            if self._length[known] == self._length[at] + 1:
                return known
            return self._clone(at, token, known)
        fresh = self._add({}, self._length[at] + 1, ROOT, {}, {})
        state = at
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = fresh
            state = self._link[state]
        if state >= 0:
            target = self._next[state][token]
            exact = self._length[target] == self._length[state] + 1
            self._link[fresh] = target if exact else self._clone(state, token, target)
        return fresh

    def _clone(self, state: int, token: int, target: int) -> int:
        clone = self._add(
            dict(self._next[target]),
            self._length[state] + 1,
            self._link[target],
            dict(self._follow[target]),
            dict(self._latest[target]),
        )
        self._link[target] = clone
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _add(
        self, edges: dict[int, int], length: int, link: int, follow: dict[int, float], latest: dict[int, int]
    ) -> int:
        self._next.append(edges)
        self._length.append(length)
        self._link.append(link)
        self._follow.append(follow)
        self._latest.append(latest)
        return len(self._next) - 1

    def continuation(
        self, sequence: int, max_tokens: int, min_match: int = 1, min_prob: float = 0.0, escape: float = 0.0
    ) -> Continuation | None:
        """What most often followed the longest suffix of `sequence` that was ever continued; None without one.

        Follows the heaviest continuation (ties: the one seen first) until max_tokens, or until the product of the
        relative weights falls below min_prob, or the text ends. escape: weight, in occurrences of `sequence`, of
        "something never seen here": it keeps a context seen once from looking certain.
        """
        state = self._last[sequence]
        while state != ROOT and not self._follow[state]:
            state = self._link[state]
        match_len = self._length[state]
        if match_len < min_match or not self._follow[state]:
            return None
        tokens: list[int] = []
        probs: list[float] = []
        prob, source = 1.0, -1
        unseen = escape * self._weight[sequence]
        while len(tokens) < max_tokens:
            follow = self._follow[state]
            if not follow:
                break
            token = max(follow, key=follow.__getitem__)
            prob *= follow[token] / (sum(follow.values()) + unseen)
            if prob < min_prob:
                break
            if not tokens:
                source = self._latest[state][token]
            tokens.append(token)
            probs.append(prob)
            state = self._next[state][token]
        return Continuation(tokens, probs, match_len, source) if tokens else None

    def follow_weights(self, context: list[int]) -> dict[int, float]:
        """Weight of every token that followed `context` anywhere; empty when it never occurred inside a sequence."""
        state = ROOT
        for token in context:
            known = self._next[state].get(token)
            if known is None:
                return {}
            state = known
        return dict(self._follow[state])

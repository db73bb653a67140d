"""The live tier of the suffix index in plain Python: the specification of kernels/csrc/suffix_live.h, and of how a
chain is drafted from it (suffix_draft.h).

Invariants
- Sequences grow in any order; a place is (sequence, position), and places of one pair of tokens, and of one token, are
  looked at latest first, MAX_PLACES of them. Two pairs with the same hash, which the native tier may have to skip among
  those, do not exist here.
- START opens every sequence but the prompt's and pairs with nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

START = -1
PROMPT_SEQUENCE = 0
MAX_PLACES = 8
MAX_MATCH = 32
ENOUGH = 3.0

Place = tuple[int, int]


@dataclass(slots=True)
class LiveChain:
    """A drafted chain. match_len: context tokens that matched; sequence: where the first token stood."""

    tokens: list[int] = field(default_factory=list)
    path_probs: list[float] = field(default_factory=list)
    match_len: int = 0
    sequence: int = -1


class LiveText:
    """The text of one prompt's requests. prompt: the tokens of sequence 0."""

    def __init__(self, prompt: list[int]) -> None:
        self._texts: list[list[int]] = [[]]
        self._by_pair: dict[tuple[int | None, int], list[Place]] = {}
        self._by_token: dict[int, list[Place]] = {}
        for token in prompt:
            self.append(PROMPT_SEQUENCE, token)

    def open(self) -> int:
        """A new sequence's number."""
        self._texts.append([])
        self.append(len(self._texts) - 1, START)
        return len(self._texts) - 1

    def append(self, sequence: int, token: int) -> None:
        """The sequence goes on with this token."""
        text = self._texts[sequence]
        place = (sequence, len(text))
        self._by_pair.setdefault((text[-1] if text else None, token), []).append(place)
        self._by_token.setdefault(token, []).append(place)
        text.append(token)

    def draft(
        self, sequence: int, max_tokens: int, min_match: int, max_candidates: int, escape: float, min_prob: float = 0.0
    ) -> LiveChain:
        """The chain with the largest sum of path probabilities, out of those from the longest match and up to
        max_candidates - 1 shorter ones; relative weights are taken at their word."""
        end = (sequence, len(self._texts[sequence]) - 1)
        found = self._find(end, min(min_match, end[1] + 1))
        best = LiveChain()
        for length in sorted({length for _, length in found}, reverse=True)[:max_candidates]:
            if sum(best.path_probs) >= ENOUGH:
                break
            group = [place for place, match in found if match >= length]
            chain = self._follow(group, length, max_tokens, min_match, escape, min_prob)
            if sum(chain.path_probs) > sum(best.path_probs):
                best = chain
        return best

    def _find(self, end: Place, min_match: int) -> list[tuple[Place, int]]:
        """(where it goes on, tokens that match) of the places of the last pair, or else of the last token."""
        text = self._texts[end[0]]
        pair = (text[end[1] - 1] if end[1] else None, text[end[1]])
        found = self._look(self._by_pair[pair], end, 1 if pair[1] == START else max(min_match, 2))
        return found or (self._look(self._by_token[pair[1]], end, 1) if min_match <= 1 else [])

    def _look(self, places: list[Place], end: Place, least: int) -> list[tuple[Place, int]]:
        others = [place for place in reversed(places) if place != end][:MAX_PLACES]
        found = [((sequence, at + 1), self._match((sequence, at), end)) for sequence, at in others]
        return [(next_, n) for next_, n in found if n >= least and next_[1] < len(self._texts[next_[0]])]

    def _match(self, a: Place, b: Place) -> int:
        x, y = self._texts[a[0]][: a[1] + 1][::-1], self._texts[b[0]][: b[1] + 1][::-1]
        length = 0
        while length < min(MAX_MATCH, len(x), len(y)) and x[length] == y[length]:
            length += 1
        return length

    def _follow(
        self, group: list[Place], matched: int, max_tokens: int, min_resume: int, escape: float, min_prob: float
    ) -> LiveChain:
        """What most places go on with, of equals the latest; where all texts end, the longest match of the end."""
        out, path = LiveChain(match_len=matched), 1.0
        while len(out.tokens) < max_tokens:
            tokens = [self._texts[sequence][at] for sequence, at in group]
            token = max(tokens, key=tokens.count)
            path *= tokens.count(token) / (len(tokens) + escape)
            if path < min_prob:
                break
            if not out.tokens:
                out.sequence = group[tokens.index(token)][0]
            out.tokens.append(token)
            out.path_probs.append(path)
            matched += 1
            passed = [place for place, each in zip(group, tokens, strict=True) if each == token]
            group = [(sequence, at + 1) for sequence, at in passed if at + 1 < len(self._texts[sequence])]
            if not group:
                found = self._find(passed[-1], min_resume)
                if not found:
                    break
                matched = max(length for _, length in found)
                group = [place for place, length in found if length == matched]
        return out

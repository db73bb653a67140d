"""The drafter's indexes in plain Python: the specification of drafter/suffix_native.py, and its stand-in.

Invariants
- One index per prompt_id holds its windowed history and, from this step, every sibling in flight as its tokens are
  accepted; a request's own text is part of it.
- Every sequence starts with START, so a response can be drafted from its first token on.
- Sequences of visit v weigh decay**(-v) when they join: relative to the newest visit, older ones fade geometrically.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slipstream.drafter.base import (
    SOURCE_HISTORY,
    SOURCE_PROMPT,
    SOURCE_SELF,
    SOURCE_SIBLING,
    DraftBatch,
    HistoryRecord,
    LiveBatch,
    Price,
    Ragged,
)
from slipstream.drafter.history import HistoryLog
from slipstream.drafter.shared_folder import SharedFolder
from slipstream.kernels.suffix_index import SuffixIndex

START = -1
PROMPT_SEQUENCE = 0


@dataclass(slots=True)
class _PromptIndex:
    """The automaton of one prompt. live_from: first sequence of the current step; visits: visits inserted so far."""

    index: SuffixIndex
    live_from: int = 1
    visits: int = 0


@dataclass(slots=True)
class _Open:
    prompt_id: str
    sequence: int


class PlainSuffixIndexes:
    """One automaton per prompt for history and live text alike; arguments as for SuffixDrafter."""

    def __init__(self, history: HistoryLog, min_match: int, decay: float, escape: float) -> None:
        self.history = history
        self.min_match, self.decay, self.escape = min_match, decay, escape
        self._prompts: dict[str, _PromptIndex] = {}
        self._open: dict[int, _Open] = {}
        self._inserted: set[int] = set()

    def begin(self, uid: int, prompt_id: str, prompt: np.ndarray) -> None:
        """Opens a request; its index is built from the history on the prompt's first visit."""
        if uid in self._open:
            raise ValueError(f"uid {uid} is open already")
        if prompt_id not in self._prompts:
            self._prompts[prompt_id] = self._build(prompt_id, prompt)
        held = self._prompts[prompt_id]
        self._open[uid] = _Open(prompt_id, self._start(held))

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        """The heaviest continuation of each row's longest match."""
        for row, uid in enumerate(batch.uids.tolist()):
            limit = int(price.max_draft[row])
            if limit == 0:
                continue
            held = self._open[uid]
            prompt = self._prompts[held.prompt_id]
            # START counts as context: a response that has matched from its first token on needs no minimum.
            min_match = min(self.min_match, int(batch.num_generated[row]) + 1)
            min_prob = float(price.min_accept_prob[row])
            draft = prompt.index.continuation(held.sequence, limit, min_match, min_prob, self.escape)
            if draft is None:
                continue
            count = len(draft.tokens)
            out.tokens[row, :count] = draft.tokens
            out.count[row] = count
            out.match_len[row] = draft.match_len
            out.source[row] = self._source(prompt, held, draft.sequence)
            out.probs[row, :count] = draft.path_probs

    def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
        """Siblings see accepted tokens from the next step on."""
        tokens, offsets = accepted.values.tolist(), accepted.offsets.tolist()
        for row, uid in enumerate(batch.uids.tolist()):
            held = self._open[uid]
            index = self._prompts[held.prompt_id].index
            for token in tokens[offsets[row] : offsets[row + 1]]:
                index.append(held.sequence, token)

    def end(self, uid: int, finished: bool) -> None:
        """Closes a request; what it generated stays visible to its siblings."""
        del self._open[uid]
        if finished:
            self._inserted.add(uid)

    def share(self, folder: SharedFolder) -> None:
        """The plain index is built by every worker for itself."""

    def calibrate(self, probabilities: np.ndarray) -> None:
        """The plain index keeps to its own estimate."""

    def publish(self, records: list[HistoryRecord]) -> None:
        """Rolls the window: rollouts of other workers join, indexes that hold too much of the past are dropped and
        rebuilt on the prompt's next visit. The records are in the history already."""
        for record in records:
            held = self._prompts.get(record.prompt_id)
            if held is not None and record.uid not in self._inserted:
                self._insert(held, record)
        for prompt_id in {record.prompt_id for record in records}:
            held = self._prompts.get(prompt_id)
            if held is None:
                continue
            held.visits += 1
            held.live_from = held.index.num_sequences
            if held.visits > 2 * self.history.window_epochs and not self._is_open(prompt_id):
                del self._prompts[prompt_id]
        self._inserted.clear()

    def wait(self) -> None:
        """Nothing is built in the background."""

    def follow_weights(self, prompt_id: str, context: list[int]) -> dict[int, float]:
        """Weight of every token that followed `context`; empty for a prompt without an index."""
        held = self._prompts.get(prompt_id)
        return held.index.follow_weights(context) if held is not None else {}

    def _is_open(self, prompt_id: str) -> bool:
        return any(held.prompt_id == prompt_id for held in self._open.values())

    def _build(self, prompt_id: str, prompt: np.ndarray) -> _PromptIndex:
        held = _PromptIndex(SuffixIndex())
        held.index.open_sequence()
        for token in prompt.tolist():
            held.index.append(PROMPT_SEQUENCE, token)
        for records in self.history.visits(prompt_id):
            for record in records:
                self._insert(held, record)
            held.visits += 1
        held.live_from = held.index.num_sequences
        return held

    def _start(self, held: _PromptIndex) -> int:
        sequence = held.index.open_sequence(self.decay**-held.visits)
        held.index.append(sequence, START)
        return sequence

    def _insert(self, held: _PromptIndex, record: HistoryRecord) -> None:
        sequence = self._start(held)
        for token in record.tokens.tolist():
            held.index.append(sequence, token)

    @staticmethod
    def _source(prompt: _PromptIndex, held: _Open, sequence: int) -> int:
        if sequence == held.sequence:
            return SOURCE_SELF
        if sequence == PROMPT_SEQUENCE:
            return SOURCE_PROMPT
        return SOURCE_SIBLING if sequence >= prompt.live_from else SOURCE_HISTORY

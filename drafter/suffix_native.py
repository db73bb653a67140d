"""The drafter's indexes in C++: kernels/csrc/suffix_set.h behind numpy arrays.

Invariants
- A prompt has two tiers: a frozen one of its prompt text and history, rebuilt in the background when the window
  rolls, and a live one of the responses sampled since. A request drafts from both and keeps the frozen tier it began
  with.
- The frozen tier weighs the newest visit 1, the one before it `decay`, then decay**2, and so on, exactly.
- Frozen tiers of all prompts together hold at most max_index_tokens, the least recently begun going first; a prompt
  with open requests stays. A tier that went is rebuilt from the history at the prompt's next visit.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np

from slipstream.drafter.base import DraftBatch, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.history import HistoryLog
from slipstream.kernels.dispatch import NATIVE_ERROR, KernelError, _native


@dataclass(slots=True)
class _Held:
    """A prompt that has an index. num_tokens: in its frozen tier; num_open: requests that draft from it."""

    prompt: np.ndarray
    num_tokens: int = 0
    num_open: int = 0


class NativeSuffixIndexes:
    """Frozen and live suffix automata of every prompt; arguments as for SuffixDrafter."""

    def __init__(self, history: HistoryLog, min_match: int, decay: float, escape: float, max_index_tokens: int) -> None:
        if _native is None:
            raise KernelError(f"index=native: the extension is not built ({NATIVE_ERROR})")
        self.history, self.decay, self.max_index_tokens = history, decay, max_index_tokens
        self._set = _native.SuffixIndexSet(min_match=min_match, escape=escape)
        self._prompts: OrderedDict[str, _Held] = OrderedDict()
        self._prompt_of: dict[int, str] = {}
        self._num_tokens = 0
        self._probs = np.zeros((0, 0), np.float32)

    def begin(self, uid: int, prompt_id: str, prompt: np.ndarray) -> None:
        """Opens a request; its frozen tier is built from the history on the prompt's first visit."""
        if uid in self._prompt_of:
            raise ValueError(f"uid {uid} is open already")
        if prompt_id not in self._prompts:
            self._prompts[prompt_id] = _Held(prompt.astype(np.int32))
            self._build(prompt_id)
        self._set.begin(uid, prompt_id)
        self._prompt_of[uid] = prompt_id
        self._prompts[prompt_id].num_open += 1
        self._prompts.move_to_end(prompt_id)
        self._evict()

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        """The draft with the most expected accepted tokens, for the whole batch in one call."""
        if self._probs.shape != out.tokens.shape:
            self._probs = np.zeros(out.tokens.shape, np.float32)
        self._set.propose(
            batch.uids,
            price.max_draft,
            price.min_accept_prob,
            out.tokens,
            out.count,
            out.source,
            out.match_len,
            self._probs,
        )

    def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
        """Siblings see accepted tokens from the next step on."""
        self._set.extend(batch.uids, accepted.values, accepted.offsets)

    def end(self, uid: int, finished: bool) -> None:
        """Closes a request; what it generated stays visible to its siblings until the window rolls."""
        self._set.end(uid)
        self._prompts[self._prompt_of.pop(uid)].num_open -= 1

    def publish(self, records: list[HistoryRecord]) -> None:
        """Queues the rebuild of every prompt that has new records and an index. The records are in the history."""
        for prompt_id in dict.fromkeys(record.prompt_id for record in records):
            if prompt_id in self._prompts:
                self._build(prompt_id)
        self._evict()

    def follow_weights(self, prompt_id: str, context: list[int]) -> dict[int, float]:
        """Weight of every token that followed `context`, both tiers together; waits for pending rebuilds."""
        self._set.wait()
        total: Counter[int] = Counter()
        for live in (False, True):
            total.update(dict(self._set.follow_weights(prompt_id, context, live)))
        return dict(total)

    def _build(self, prompt_id: str) -> None:
        held = self._prompts[prompt_id]
        visits = self.history.visits(prompt_id)
        texts, weights = [held.prompt], [self.decay ** len(visits)]
        for age, records in enumerate(reversed(visits)):
            texts += [record.tokens for record in records]
            weights += [self.decay**age] * len(records)
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        values = np.concatenate(texts).astype(np.int32)
        self._set.publish(prompt_id, values, offsets, np.array(weights, np.float32), num_plain=1)
        self._num_tokens += len(values) - held.num_tokens
        held.num_tokens = len(values)

    def _evict(self) -> None:
        for prompt_id in [name for name, held in self._prompts.items() if held.num_open == 0]:
            if self._num_tokens <= self.max_index_tokens:
                return
            self._set.drop(prompt_id)
            self._num_tokens -= self._prompts.pop(prompt_id).num_tokens

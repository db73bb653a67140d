"""The drafter's indexes in C++: kernels/csrc/suffix_set.h behind numpy arrays.

Invariants
- A prompt has two tiers: a frozen one of its history, rebuilt in the background when the window rolls, and a live one
  of its own text and the responses sampled since. A request drafts from both and keeps the frozen tier it began with.
- Where they know little, a request drafts from the newest rollouts of all prompts, up to `shared_tokens` of them.
- The frozen tier weighs the newest visit 1, the one before it `decay`, then decay**2, and so on, exactly.
- Frozen tiers of all prompts together hold at most max_index_tokens, the least recently begun going first; a prompt
  with open requests stays. A tier that went is rebuilt from the history at the prompt's next visit.
- With a shared folder, its builder builds every prompt as soon as the window rolls, and readers map what it wrote.
"""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slipstream.drafter.base import DraftBatch, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.history import HistoryLog
from slipstream.drafter.shared_folder import SharedFolder
from slipstream.kernels.dispatch import KernelError
from slipstream.kernels.native import NATIVE_ERROR, _native

SHARED_REBUILD_SHARE = 0.25
"""The shared text is rebuilt when this share of it would be new: a constant cost per token, however long the run."""


@dataclass(slots=True)
class _Held:
    """A prompt that has an index. version: newest visit and number of records in it; num_tokens: in its frozen tier;
    num_open: requests."""

    version: tuple[int, int] = (-1, 0)
    num_tokens: int = 0
    num_open: int = 0


class NativeSuffixIndexes:
    """Frozen suffix automata and live text of every prompt; arguments as for SuffixDrafter."""

    def __init__(
        self,
        history: HistoryLog,
        min_match: int,
        decay: float,
        escape: float,
        max_index_tokens: int,
        shared_tokens: int = 0,
        num_threads: int = 1,
        threads_from: int = 1024,
        folder: SharedFolder | None = None,
    ) -> None:
        if _native is None:
            raise KernelError(f"index=native: the extension is not built ({NATIVE_ERROR})")
        self.history, self.decay, self.max_index_tokens = history, decay, max_index_tokens
        self.shared_tokens, self.folder = shared_tokens, folder
        self._set = _native.SuffixIndexSet(
            min_match=min_match, escape=escape, threads=num_threads, threads_from=threads_from
        )
        self._prompts: OrderedDict[str, _Held] = OrderedDict()
        self._prompt_of: dict[int, str] = {}
        self._num_tokens = self._num_shared = self._num_new = self._text_version = 0
        self._text: Path | None = None
        self._chains = np.ones(0, np.int32)

    def begin(self, uid: int, prompt_id: str, prompt: np.ndarray) -> None:
        """Opens a request; the prompt's frozen tier is made or mapped if it is not the newest."""
        if uid in self._prompt_of:
            raise ValueError(f"uid {uid} is open already")
        held = self._prompts.setdefault(prompt_id, _Held())
        if held.version != self._newest(prompt_id):
            self._refresh(prompt_id)
        self._set.begin(uid, prompt_id, prompt.astype(np.int32, copy=False))
        self._prompt_of[uid] = prompt_id
        held.num_open += 1
        self._prompts.move_to_end(prompt_id)
        self._evict()

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        """The draft with the most expected accepted tokens, for the whole batch in one call."""
        branching = price.branching
        if branching is None:
            if len(self._chains) < len(batch.uids):
                self._chains = np.ones(len(out.count), np.int32)
            branching = self._chains
        self._set.propose(
            batch.uids,
            price.max_draft,
            price.min_accept_prob,
            branching,
            out.tokens,
            out.count,
            out.source,
            out.age,
            out.match_len,
            out.probs,
            out.cells,
            out.parents,
        )

    def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
        """Siblings see accepted tokens from the next step on."""
        self._set.extend(batch.uids, accepted.values, accepted.offsets)

    def end(self, uid: int, finished: bool) -> None:
        """Closes a request; what it generated stays visible to its siblings until the window rolls."""
        self._set.end(uid)
        self._prompts[self._prompt_of.pop(uid)].num_open -= 1

    def share(self, folder: SharedFolder) -> None:
        """See SuffixDrafter.share. Raises ValueError for a builder, whose files others count on."""
        if self.folder is not None and self.folder.role == "builder":
            raise ValueError("a builder of shared indexes stays one")
        self.folder, self._text = folder, None

    def calibrate(self, probabilities: np.ndarray) -> None:
        """From now on a cell's probability is what was measured of it."""
        self._set.calibrate(np.ascontiguousarray(probabilities, np.float32))

    def publish(self, records: list[HistoryRecord]) -> None:
        """The history has taken `records` in: queues the rebuild of their prompts, here or at the folder's builder."""
        is_builder = self.folder is not None and self.folder.role == "builder"
        for prompt_id in dict.fromkeys(record.prompt_id for record in records):
            if is_builder:
                self._prompts.setdefault(prompt_id, _Held())
            if is_builder or (self.folder is None and prompt_id in self._prompts):
                self._build(prompt_id)
        if self.shared_tokens:
            self._roll_text(sum(len(record.tokens) for record in records))
        self._evict()

    def follow_weights(self, prompt_id: str, context: list[int]) -> dict[int, float]:
        """Weight of every token that followed `context`, both tiers together; waits for pending rebuilds."""
        self._set.wait()
        total: Counter[int] = Counter()
        for live in (False, True):
            total.update(dict(self._set.follow_weights(prompt_id, context, live)))
        return dict(total)

    def wait(self) -> None:
        """See SuffixDrafter.wait."""
        self._set.wait()

    def stats(self) -> dict[str, int]:
        """prompts, open_requests, and tokens and bytes of the frozen, live and shared text."""
        return dict(self._set.stats())

    def _newest(self, prompt_id: str) -> tuple[int, int]:
        visits = self.history.visits(prompt_id)
        return (visits[-1][0].step if visits else -1, sum(map(len, visits)))

    def _refresh(self, prompt_id: str) -> None:
        """Maps the builder's index if there is one, else builds."""
        version = self._newest(prompt_id)
        if self.folder is not None and self.folder.role == "reader":
            file = self.folder.index_file(prompt_id, *version)
            # A builder may replace a file between the look and the mapping; what was right a moment ago is rebuilt.
            with contextlib.suppress(OSError, _native.BadIndexFileError):
                if self.folder.find(file):
                    self._set.attach(prompt_id, str(file))
                    self._account(prompt_id, version)
                    self.folder.num_mapped += 1
                    return
            self.folder.num_missed += 1
        self._build(prompt_id)

    def _build(self, prompt_id: str) -> None:
        texts, weights, ages = [], [], []
        visits = self.history.visits(prompt_id)
        for age in range(len(visits), 0, -1):
            for record in visits[-age]:
                texts.append(record.tokens)
                weights.append(self.decay ** (age - 1))
                ages.append(min(age, 255))
        values, offsets = _flat(texts)
        version, path = self._newest(prompt_id), ""
        if self.folder is not None and self.folder.role == "builder":
            file = self.folder.index_file(prompt_id, *version)
            self.folder.promise(prompt_id, file)
            path = str(file)
        self._set.publish(prompt_id, values, offsets, np.array(weights, np.float32), np.array(ages, np.uint8), path)
        self._account(prompt_id, version)

    def _account(self, prompt_id: str, version: tuple[int, int]) -> None:
        held = self._prompts[prompt_id]
        num_tokens = sum(len(record.tokens) for records in self.history.visits(prompt_id) for record in records)
        self._num_tokens += num_tokens - held.num_tokens
        held.num_tokens, held.version = num_tokens, version

    def _roll_text(self, num_new: int) -> None:
        if self.folder is not None and self.folder.role == "reader":
            newest = self.folder.newest_text()
            if newest is not None and newest != self._text:
                with contextlib.suppress(OSError, _native.BadIndexFileError):
                    self._set.attach_shared(str(newest))
                    self._text = newest
            return
        self._num_new += num_new
        if self._num_new < SHARED_REBUILD_SHARE * self._num_shared:
            return
        records = sorted(self.history, key=lambda record: record.step)
        kept, total = [], 0
        while records and total < self.shared_tokens:
            kept.append(records.pop().tokens[: self.shared_tokens - total])
            total += len(kept[-1])
        values, offsets = _flat(kept[::-1])
        path = ""
        if self.folder is not None:
            self._text_version += 1
            file = self.folder.text_file(self._text_version)
            self.folder.promise(None, file)
            path = str(file)
        self._set.publish_shared(values, offsets, path)
        self._num_shared, self._num_new = total, 0

    def _evict(self) -> None:
        if self._num_tokens <= self.max_index_tokens:
            return
        for prompt_id in [name for name, held in self._prompts.items() if held.num_open == 0]:
            if self._num_tokens <= self.max_index_tokens:
                return
            self._set.drop(prompt_id)
            if self.folder is not None and self.folder.role == "builder":
                self.folder.forget(prompt_id)
            self._num_tokens -= self._prompts.pop(prompt_id).num_tokens


def _flat(texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    values = np.concatenate(texts).astype(np.int32, copy=False) if texts else np.zeros(0, np.int32)
    return values, offsets

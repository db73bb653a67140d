"""The peer: the suffix trees of arctic-inference, driven as vLLM's suffix decoding drives them.

One tree of all responses, finished and in flight, and one tree of each live request's own text; a step asks both trees
of every live request, one request at a time, and then appends what was accepted to both.

Invariants: the package is optional; what is timed are its own calls, never the arrays around them, and they get what
vLLM hands them: the context as an array, new tokens as a list.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slipstream.drafter.base import SOURCE_HISTORY, DraftBatch, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.experiments.drafter_index.build_arctic import COMMAND

DEPTHS = (24, 64)
"""Tree depths to measure: vLLM's default and the package's own."""
DEFAULT_DEPTH, DEFAULT_FACTOR = 24, 1.0
"""vLLM's: a draft has at most `factor` tokens for each token of context that matched."""
DEEP, DEEP_FACTOR = 64, 4.0


class Peer(NamedTuple):
    """Classes of the package. cache: SuffixDecodingCache; tree: SuffixTree."""

    cache: Any
    tree: Any


def find_arctic(folder: Path) -> tuple[Peer | None, str | None]:
    """The package in `folder`, else the installed one; (None, why in one line) where neither can be imported."""
    front = [str(folder)] if folder.is_dir() else []
    before = list(sys.path)
    sys.path[:0] = front
    try:
        package = import_module("arctic_inference.suffix_decoding")
        native = import_module("arctic_inference.suffix_decoding._C")
    except ImportError as error:
        reason = " ".join(str(error).split())
        return None, f"arctic-inference is neither in {folder} nor installed ({reason}); `{COMMAND} --out {folder}`"
    finally:
        sys.path[:] = before
    return Peer(package.SuffixDecodingCache, native.SuffixTree), None


class ArcticDrafter:
    """The peer's cache behind our protocol. step_us: CPU microseconds of its calls, one for each propose + extend."""

    name = "arctic"

    def __init__(self, peer: Peer, depth: int = DEFAULT_DEPTH, factor: float = DEFAULT_FACTOR) -> None:
        self._cache = peer.cache(max_tree_depth=depth)
        self._depth, self._factor = depth, factor
        self._open: dict[int, np.ndarray] = {}
        self._ended: list[int] = []
        self._num_published = 0
        self._propose_s = 0.0
        self.step_us: list[float] = []

    def begin(self, uid: int, prompt_id: str, prompt: np.ndarray) -> None:
        """Opens a request; prompt_id is not used."""
        self._cache.start_request(uid, prompt.astype(np.int32))
        self._open[uid] = prompt[-self._depth :].astype(np.int32)

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        """The better of what the two trees of each row say."""
        asked = [
            (row, uid, self._open[uid], limit, least)
            for row, (uid, limit, least) in enumerate(
                zip(batch.uids.tolist(), price.max_draft.tolist(), price.min_accept_prob.tolist(), strict=True)
            )
            if limit > 0 and len(self._open[uid])
        ]
        speculate, factor = self._cache.speculate, self._factor
        started = time.thread_time()
        drafts = [
            (row, speculate(uid, context, max_spec_tokens=limit, max_spec_factor=factor, min_token_prob=least))
            for row, uid, context, limit, least in asked
        ]
        self._propose_s = time.thread_time() - started
        for row, draft in drafts:
            count = len(draft.token_ids)
            out.tokens[row, :count] = draft.token_ids
            out.count[row], out.match_len[row] = count, draft.match_len
            out.source[row] = SOURCE_HISTORY

    def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
        """Appends to both trees of each row."""
        uids = batch.uids.tolist()
        rows = [accepted.row(row).tolist() for row in range(len(uids))]
        add = self._cache.add_active_response
        started = time.thread_time()
        for uid, tokens in zip(uids, rows, strict=True):
            add(uid, tokens)
        self.step_us.append(1e6 * (self._propose_s + time.thread_time() - started))
        for uid, tokens in zip(uids, rows, strict=True):
            self._open[uid] = np.concatenate([self._open[uid], np.array(tokens, np.int32)])[-self._depth :]

    def end(self, uid: int, finished: bool) -> None:
        """Closes a request; its response stays in the tree of all."""
        self._cache.stop_request(uid)
        del self._open[uid]
        self._ended.append(uid)

    def calibrate(self, probabilities: np.ndarray) -> None:
        """The peer keeps to its own estimate."""

    def publish(self, step: int, records: list[HistoryRecord]) -> None:
        """Inserts the responses that it has not seen in flight."""
        for record in records:
            if record.uid in self._cache.cached_requests:
                continue
            self._num_published += 1
            name = ("published", self._num_published)
            self._cache.start_request(name, np.zeros(0, np.int32))
            self._cache.add_active_response(name, record.tokens)
            self._cache.stop_request(name)
        self._ended.clear()

    def forget_ended(self) -> None:
        """Takes the responses that ended since the last publish out of the tree of all."""
        for uid in self._ended:
            self._cache.evict_cached_response(uid)
        self._ended.clear()


def insert_rate(peer: Peer, rollouts: np.ndarray, depth: int) -> float:
    """Tokens per CPU second into one tree per prompt. rollouts: [prompts, samples, length] int32."""
    seconds = 0.0
    for samples in rollouts:
        tree = peer.tree(depth)
        started = time.thread_time()
        for sequence, tokens in enumerate(samples):
            tree.extend_ndarray(sequence, tokens)
        seconds += time.thread_time() - started
    return rollouts.size / seconds

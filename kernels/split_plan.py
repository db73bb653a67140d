"""Which programs of the attention kernel read which keys: arrays of plain numbers, made on the host once a step.

Invariants
- Every key that a query token may see lies in exactly one split of its request, and no split is empty.
- Splits are counted from position 0, whatever the first visible one is: with a fixed split the order of a sum depends
  on the positions alone.
- Scratch rows of two splits never overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_WIDTH = 32
"""Query tokens of one request in one pass: the bits of an ancestor mask."""

FIXED_SPLIT_KEYS = 512
"""Keys of one split under batch_invariant."""

MIN_SPLIT_KEYS = 128
"""A split is a multiple of this many keys, so that no block of keys straddles two."""

SKIP = -1
"""The request of a work item, or of a token, that only pads its array."""


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """work: [N, 4] int32: request, first key, key after the last, first scratch token; spans: [B, 3] int32: first
    split, last split, first scratch token; scratch_tokens: query tokens times splits, summed."""

    work: np.ndarray
    spans: np.ndarray
    scratch_tokens: int


def plan_splits(contexts: np.ndarray, widths: np.ndarray, first_keys: np.ndarray, split_keys: int) -> SplitPlan:
    """Non-empty splits only, in the order of the requests.

    contexts, widths, first_keys: [B] int64: keys before the first query token, query tokens (at least 1), and the
    first position that any of them sees.
    """
    ends = contexts + widths
    first, last = first_keys // split_keys, (ends - 1) // split_keys
    counts = last - first + 1
    request = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    size = counts * widths
    base = np.cumsum(size) - size
    low = (first[request] + nth) * split_keys
    high = np.minimum(low + split_keys, ends[request])
    work = np.stack([request, low, high, base[request] + nth * widths[request]], axis=1).astype(np.int32)
    return SplitPlan(work, np.stack([first, last, base], axis=1).astype(np.int32), int(size.sum()))


def even_split_keys(num_keys: int, programs_per_key: int, target_programs: int) -> int:
    """Keys of one split so that about target_programs programs share num_keys keys evenly.

    With it a batch of B requests has at most target_programs // programs_per_key + B splits.
    """
    share = -(-num_keys * programs_per_key // target_programs)
    return max(-(-share // MIN_SPLIT_KEYS), 1) * MIN_SPLIT_KEYS


def chain_pieces(contexts: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts chains of any width into pieces of at most MAX_WIDTH tokens: (owner [P], contexts [P], widths [P]).

    A piece sees the pieces before it as context: their keys are in the cache before any attention runs.
    """
    counts = -(-widths // MAX_WIDTH)
    owner = np.repeat(np.arange(len(widths)), counts)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, contexts[owner] + nth * MAX_WIDTH, np.minimum(widths[owner] - nth * MAX_WIDTH, MAX_WIDTH)

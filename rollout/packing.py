"""Packs the tokens of one forward pass; array work only, no Python per request.

Invariants: rows of a request are contiguous and in order of their places in its slot, which are their positions but in
draft trees; a request gets draft rows only when its one pending token is in the pass; the packed length never exceeds
max_forward_tokens before padding to ROW_MULTIPLE.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slipstream.drafter.base import DraftBatch, Price
from slipstream.rollout.slots import SlotTable

ROW_MULTIPLE = 4
"""Matrix products on the CPU use other code, with other rounding, for 1 to 3 rows or ragged rests of a tile."""


@dataclass(frozen=True, slots=True)
class TreePlan:
    """What a pass with draft trees needs besides. positions: [T] int64, of every packed token; parents: [T] int64, the
    packed index of the token before each draft token, -1 for others; row_parents: [R] int32, the row of the request
    before each sampled row, -1 for its first."""

    positions: np.ndarray
    parents: np.ndarray
    row_parents: np.ndarray


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass.

    token_ids, slots, positions: [T] int64, padded (padding lives in the spare slot, index num_slots); with a tree,
    positions are places.
    live_slots, widths: [B'] slots with at least one token in the pass, and int64, how many. chunk_slots, chunk_sizes:
    prompt chunks that do not reach the end of the context yet. sampling_slots: [R'] slots that sample; row_offsets:
    [R' + 1] int64 into the sampled rows; row_drafts: [R] int32, the draft token fed after each row or -1; logit_rows:
    [R padded] int64, the packed index of each sampled row. draft_rows: [R'] rows of the DraftBatch; draft_counts,
    draft_sources: [R']; num_drafted: draft tokens of all; num_cached: of the live requests before
    the pass. tree: where a draft branches.
    """

    token_ids: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    live_slots: np.ndarray
    widths: np.ndarray
    chunk_slots: np.ndarray
    chunk_sizes: np.ndarray
    sampling_slots: np.ndarray
    row_offsets: np.ndarray
    row_drafts: np.ndarray
    logit_rows: np.ndarray
    draft_rows: np.ndarray
    draft_counts: np.ndarray
    draft_sources: np.ndarray
    num_prefill_tokens: int
    num_drafted: int = 0
    num_cached: int = 0
    tree: TreePlan | None = None


def cut_invalid_drafts(drafts: DraftBatch, rows: int, vocab_size: int) -> int:
    """Ends drafts before their first token outside the vocabulary (a drafter may be wrong, never harmful); how many."""
    tokens = drafts.tokens[:rows]
    if int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size:
        return 0
    used = np.arange(tokens.shape[1]) < drafts.count[:rows, None]
    invalid = used & ((tokens < 0) | (tokens >= vocab_size))
    hit = np.flatnonzero(invalid.any(axis=1))
    drafts.count[hit] = invalid[hit].argmax(axis=1)
    return len(hit)


def _offsets(counts: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _within(counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)


def _share(wanted: np.ndarray, available: int) -> np.ndarray:
    """Gives each row what it wants, in order, until `available` is used up."""
    before = np.cumsum(wanted) - wanted
    return np.clip(available - before, 0, wanted)


def _write_drafts(table: SlotTable, slots: np.ndarray, drafts: DraftBatch, counts: np.ndarray) -> None:
    row_of = np.repeat(np.arange(len(slots)), counts)
    nth = _within(counts, _offsets(counts))
    table.tokens[slots[row_of], table.length[slots][row_of] + nth] = drafts.tokens[row_of, nth]


def plan_trees(
    drafts: DraftBatch, rows: np.ndarray, counts: np.ndarray, logit_rows: np.ndarray, places: np.ndarray, pad: int
) -> TreePlan | None:
    """Of the sampled rows of a pass, `counts` draft tokens of each of these rows of the drafts; None for chains alone.

    logit_rows: [R] packed index of each sampled row; places: [T] of the packed tokens, to which `pad` are added.
    """
    row_of = np.repeat(np.arange(len(rows)), counts)
    nth = _within(counts, _offsets(counts))
    before = drafts.parents[rows[row_of], nth].astype(np.int64) + 1
    if (before == nth).all():
        return None
    first = _offsets(counts + 1)[:-1]
    row_parents = np.full(len(logit_rows), -1, np.int64)
    drafted = first[row_of] + nth + 1
    row_parents[drafted] = before
    # A token's depth is the number of its ancestors: each round doubles the distance looked back.
    back, depth = np.arange(len(logit_rows)), np.zeros(len(logit_rows), np.int64)
    back[drafted], depth[drafted] = first[row_of] + before, 1
    for _ in range(int(counts.max()).bit_length()):
        depth += depth[back]
        back = back[back]
    positions = np.concatenate([places, np.arange(pad)])
    parents = np.full(len(positions), -1, np.int64)
    at = logit_rows[drafted]
    positions[at] = places[logit_rows[first[row_of]]] + depth[drafted]
    parents[at] = logit_rows[first[row_of] + before]
    return TreePlan(positions, parents, row_parents.astype(np.int32))


def _plan_decoding(table: SlotTable, drafts: DraftBatch) -> StepPlan:
    """The pass in which every request advances by its one pending token: most of a job's, and the shortest."""
    slots = table.order
    num = len(slots)
    padded = num + -num % ROW_MULTIPLE
    positions, places = np.arange(padded) - num, np.full(padded, table.num_slots, np.int64)
    token_ids, logit_rows = np.zeros(padded, np.int64), np.arange(padded)
    positions[:num], places[:num] = table.cached[slots], slots
    token_ids[:num] = table.tokens[slots, positions[:num]]
    logit_rows[num:] = 0
    none = np.zeros(0, np.int64)
    return StepPlan(
        token_ids=token_ids,
        slots=places,
        positions=positions,
        live_slots=slots,
        widths=np.ones(num, np.int64),
        chunk_slots=none,
        chunk_sizes=none,
        sampling_slots=slots,
        row_offsets=np.arange(num + 1),
        row_drafts=np.full(num, -1, np.int32),
        logit_rows=logit_rows,
        draft_rows=np.arange(num),
        draft_counts=np.zeros(num, np.int64),
        draft_sources=drafts.source[:num].copy(),
        num_prefill_tokens=0,
        num_cached=int(positions[:num].sum()),
    )


def plan_step(table: SlotTable, drafts: DraftBatch, price: Price | None, max_forward_tokens: int) -> StepPlan:
    """Chooses the tokens of the next pass: one per decoding request, then prompt chunks, then drafts.

    Row i of `drafts` and `price` belongs to table.order[i]; price None means that nothing was drafted.
    """
    slots = table.order
    pending = table.length[slots] - table.cached[slots]
    drafted = price is not None and bool(drafts.count[: len(slots)].any())
    if not drafted and (pending == 1).all():
        return _plan_decoding(table, drafts)
    take = np.minimum(pending, 1)
    take += _share(pending - take, max_forward_tokens - len(slots))
    complete = take == pending
    counts = np.zeros(len(slots), np.int64)
    if price is not None and drafted:
        wanted = np.where(complete, np.minimum(drafts.count[: len(slots)], price.max_draft), 0)
        counts = _share(wanted.astype(np.int64), max_forward_tokens - int(take.sum()))
        _write_drafts(table, slots, drafts, counts)
    width = take + counts
    offsets = _offsets(width)
    nth = _within(width, offsets)
    row_slots = np.repeat(slots, width)
    positions = np.repeat(table.cached[slots], width) + nth
    token_ids = table.tokens[row_slots, positions].astype(np.int64)

    sampling = np.flatnonzero(complete)
    rows = counts[sampling] + 1
    row_offsets = _offsets(rows)
    row_nth = _within(rows, row_offsets)
    logit_rows = np.repeat(offsets[:-1][sampling] + take[sampling] - 1, rows) + row_nth
    row_drafts = np.full(len(logit_rows), -1, np.int32)
    has_next = row_nth < np.repeat(counts[sampling], rows)
    row_drafts[has_next] = token_ids[logit_rows[has_next] + 1]
    decoding = pending == 1
    pad = -len(token_ids) % ROW_MULTIPLE
    tree = None
    if price is not None and price.branching is not None and drafted:
        tree = plan_trees(drafts, sampling, counts[sampling], logit_rows, positions, pad)
    return StepPlan(
        token_ids=np.concatenate([token_ids, np.zeros(pad, np.int64)]),
        slots=np.concatenate([row_slots, np.full(pad, table.num_slots, np.int64)]),
        positions=np.concatenate([positions, np.arange(pad)]),
        live_slots=slots,
        widths=width,
        chunk_slots=slots[~complete],
        chunk_sizes=take[~complete],
        sampling_slots=slots[sampling],
        row_offsets=row_offsets,
        row_drafts=row_drafts,
        logit_rows=np.concatenate([logit_rows, np.zeros(-len(logit_rows) % ROW_MULTIPLE, np.int64)]),
        draft_rows=sampling,
        draft_counts=counts[sampling],
        draft_sources=drafts.source[sampling],
        num_prefill_tokens=int(take[~decoding].sum()),
        num_drafted=int(counts.sum()),
        num_cached=int(table.cached[slots].sum()),
        tree=tree,
    )

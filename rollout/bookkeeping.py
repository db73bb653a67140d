"""What an engine step does to the tables besides the pass itself: planning it, writing its tokens, counting drafts.

Invariants: the native books and their plain twins make the same plans, tables and counts; work on arrays, nothing per
request in Python. A step with drafts has several times the rows of one without: its books are what it pays for most
beside its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slipstream.drafter.base import SOURCE_NAMES, DraftBatch, LiveBatch, Price, Ragged
from slipstream.kernels.dispatch import KernelSet
from slipstream.kernels.native import _native
from slipstream.kernels.reference import SamplingRows, Verified
from slipstream.rollout.acceptance import AcceptanceBuffer
from slipstream.rollout.packing import ROW_MULTIPLE, StepPlan, cut_invalid_drafts, plan_step, plan_trees
from slipstream.rollout.slots import SlotTable


@dataclass(frozen=True, slots=True)
class Committed:
    """What a pass brought. new: tokens of every sampling slot; rounds, draft_rounds: slots that gained a token, and
    those that had a draft; drafted, accepted: draft tokens verified and kept, by source code."""

    new: Ragged
    rounds: int
    draft_rounds: int
    drafted: list[int]
    accepted: list[int]


class Books:
    """The plain twin, in numpy."""

    def live_batch(self, table: SlotTable, slots: np.ndarray) -> LiveBatch:
        """What drafters and budgets see of these slots."""
        return table.live_batch(slots)

    def sampling_rows(self, table: SlotTable, slots: np.ndarray) -> SamplingRows:
        """Sampling parameters of these slots."""
        return table.sampling_rows(slots)

    def draft_limits(self, table: SlotTable, wanted: np.ndarray, most: int) -> tuple[np.ndarray, bool]:
        """[B] int32, the most draft tokens of each live slot, and whether any may have one. wanted: [B] of the price;
        most: of anybody. None where more than one token is pending or the next one is the last."""
        slots = table.order
        length = table.length[slots]
        left = np.where(length - table.cached[slots] == 1, table.end[slots] - length - 1, 0)
        limit = np.clip(np.minimum(wanted, left), 0, most).astype(np.int32)
        return limit, bool(limit.any())

    def plan(
        self, table: SlotTable, drafts: DraftBatch, price: Price | None, max_forward_tokens: int, vocab_size: int
    ) -> tuple[StepPlan, int]:
        """The tokens of the next pass (see packing.plan_step), and how many drafts ended at a token that is none."""
        invalid = 0 if price is None else cut_invalid_drafts(drafts, len(table.order), vocab_size)
        return plan_step(table, drafts, price, max_forward_tokens), invalid

    def commit(self, table: SlotTable, plan: StepPlan, verified: Verified, version: int) -> Committed:
        """Writes the new tokens of plan.sampling_slots."""
        slots, count = plan.sampling_slots, verified.count
        row_of, nth = spread(count)
        source = plan.row_offsets[row_of] + nth
        length = table.length[slots]
        where = slots[row_of], length[row_of] + nth
        table.tokens[where] = verified.tokens[source]
        table.logprobs[where] = verified.logprobs[source]
        table.versions[where] = version
        length += count
        table.length[slots], table.cached[slots] = length, length - 1
        table.rounds[slots] += count > 0
        table.drafted[slots] += plan.draft_counts
        kept = np.maximum(count - 1, 0)
        table.accepted[slots, plan.draft_sources] += kept
        offsets = np.zeros(len(count) + 1, np.int64)
        np.cumsum(count, out=offsets[1:])
        return Committed(
            Ragged(verified.tokens[source], offsets),
            int(np.count_nonzero(count)),
            int(np.count_nonzero(plan.draft_counts)),
            np.bincount(plan.draft_sources, plan.draft_counts, len(SOURCE_NAMES)).astype(np.int64).tolist(),
            np.bincount(plan.draft_sources, kept, len(SOURCE_NAMES)).astype(np.int64).tolist(),
        )

    def observe(self, buffer: AcceptanceBuffer, drafts: DraftBatch, plan: StepPlan, verified: Verified) -> None:
        """Notes what was accepted of the drafts of this step."""
        path = None if verified.path is None else Ragged(verified.path, plan.row_offsets)
        accepted = np.maximum(verified.count - 1, 0)
        buffer.observe(drafts, plan.draft_rows, plan.draft_counts, accepted, verified.finish != 0, path)


class NativeBooks(Books):
    """The same by kernels/csrc/step_rows.h, one call each; what is about trees alone stays in numpy."""

    def live_batch(self, table: SlotTable, slots: np.ndarray) -> LiveBatch:
        """See Books.live_batch."""
        return LiveBatch(*_native.live_rows(slots, table.uid, table.prompt_len, table.length, table.end))

    def sampling_rows(self, table: SlotTable, slots: np.ndarray) -> SamplingRows:
        """See Books.sampling_rows."""
        request = table.prompt_len, table.length, table.end, table.seed, table.uid
        filters = table.temperature, table.top_p, table.top_k, table.num_stops, table.stop_ids
        return SamplingRows(*_native.sampling_rows(slots, *request, *filters))

    def draft_limits(self, table: SlotTable, wanted: np.ndarray, most: int) -> tuple[np.ndarray, bool]:
        """See Books.draft_limits."""
        limit, any_row = _native.draft_limits(table.order, table.length, table.cached, table.end, wanted, most)
        return limit, any_row

    def plan(
        self, table: SlotTable, drafts: DraftBatch, price: Price | None, max_forward_tokens: int, vocab_size: int
    ) -> tuple[StepPlan, int]:
        """See Books.plan; the drafts stay as they are."""
        *rows, num_cached, num_prefill_tokens, num_drafted, invalid = _native.plan_rows(
            table.order,
            table.tokens,
            table.length,
            table.cached,
            drafts.tokens,
            drafts.count,
            drafts.source,
            None if price is None else price.max_draft,
            vocab_size,
            max_forward_tokens,
            ROW_MULTIPLE,
        )
        token_ids, slots, positions, widths, chunk_slots, chunk_sizes = rows[:6]
        sampling_slots, row_offsets, row_drafts, logit_rows, draft_rows, draft_counts, draft_sources = rows[6:]
        tree = None
        if num_drafted and price is not None and price.branching is not None:
            used = int(widths.sum())
            sampled = logit_rows[: len(row_drafts)]
            tree = plan_trees(drafts, draft_rows, draft_counts, sampled, positions[:used], len(positions) - used)
        plan = StepPlan(
            token_ids,
            slots,
            positions,
            table.order,
            widths,
            chunk_slots,
            chunk_sizes,
            sampling_slots,
            row_offsets,
            row_drafts,
            logit_rows,
            draft_rows,
            draft_counts,
            draft_sources,
            num_prefill_tokens,
            num_drafted,
            num_cached,
            tree,
        )
        return plan, invalid

    def commit(self, table: SlotTable, plan: StepPlan, verified: Verified, version: int) -> Committed:
        """See Books.commit."""
        values, offsets, *totals = _native.commit_rows(
            plan.sampling_slots,
            plan.row_offsets,
            plan.draft_counts,
            plan.draft_sources,
            verified.tokens,
            verified.logprobs,
            verified.count,
            table.tokens,
            table.logprobs,
            table.versions,
            table.length,
            table.cached,
            table.rounds,
            table.drafted,
            table.accepted,
            version,
        )
        return Committed(Ragged(values, offsets), *totals)

    def observe(self, buffer: AcceptanceBuffer, drafts: DraftBatch, plan: StepPlan, verified: Verified) -> None:
        """See Books.observe; chains are taken in at once."""
        if verified.path is not None:
            return super().observe(buffer, drafts, plan, verified)
        model = buffer.model
        model.squared_error += _native.observe_chains(
            drafts.cells,
            drafts.probs,
            plan.draft_rows,
            plan.draft_counts,
            verified.count,
            verified.finish,
            model.seen,
            model.accepted,
            model.curve,
        )
        return None


def spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every item of [n] `counts`: its row, and its place within the row."""
    row_of = np.repeat(np.arange(len(counts)), counts)
    return row_of, np.arange(len(row_of)) - (np.cumsum(counts) - counts)[row_of]


def make_books(kernels: KernelSet) -> Books:
    """Native books where the extension is built, but for the kernels that are plain twins throughout."""
    return Books() if _native is None or kernels.name == "reference" else NativeBooks()

"""What an engine step does to the tables besides the pass itself: planning it, writing its tokens, counting drafts.

Invariants: the native books and their plain twins make the same plans, tables and counts; work on arrays, nothing per
request in Python. A step with drafts has several times the rows of one without: its books are what it pays for most
beside its tokens.
"""

from __future__ import annotations

import numpy as np

from slipstream.drafter.base import DraftBatch, Price, Ragged
from slipstream.kernels.dispatch import KernelSet
from slipstream.kernels.native_set import _native
from slipstream.kernels.reference import Verified
from slipstream.rollout.acceptance import AcceptanceBuffer
from slipstream.rollout.packing import ROW_MULTIPLE, StepPlan, cut_invalid_drafts, plan_step, plan_trees
from slipstream.rollout.slots import SlotTable


class Books:
    """The plain twin, in numpy."""

    def plan(
        self, table: SlotTable, drafts: DraftBatch, price: Price | None, max_forward_tokens: int, vocab_size: int
    ) -> tuple[StepPlan, int]:
        """The tokens of the next pass (see packing.plan_step), and how many drafts ended at a token that is none."""
        invalid = 0 if price is None else cut_invalid_drafts(drafts, len(table.order), vocab_size)
        return plan_step(table, drafts, price, max_forward_tokens), invalid

    def commit(self, table: SlotTable, plan: StepPlan, verified: Verified, version: int) -> Ragged:
        """Writes the new tokens of plan.sampling_slots and returns them, row by row."""
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
        table.accepted[slots, plan.draft_sources] += np.maximum(count - 1, 0)
        offsets = np.zeros(len(count) + 1, np.int64)
        np.cumsum(count, out=offsets[1:])
        return Ragged(verified.tokens[source], offsets)

    def observe(self, buffer: AcceptanceBuffer, drafts: DraftBatch, plan: StepPlan, verified: Verified) -> None:
        """Notes what was accepted of the drafts of this step."""
        path = None if verified.path is None else Ragged(verified.path, plan.row_offsets)
        accepted = np.maximum(verified.count - 1, 0)
        buffer.observe(drafts, plan.draft_rows, plan.draft_counts, accepted, verified.finish != 0, path)


class NativeBooks(Books):
    """The same by kernels/csrc/step_rows.h, one call each; what is about trees alone stays in numpy."""

    def plan(
        self, table: SlotTable, drafts: DraftBatch, price: Price | None, max_forward_tokens: int, vocab_size: int
    ) -> tuple[StepPlan, int]:
        """See Books.plan; the drafts stay as they are."""
        *rows, num_prefill_tokens, num_drafted, invalid = _native.plan_rows(
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
            tree,
        )
        return plan, invalid

    def commit(self, table: SlotTable, plan: StepPlan, verified: Verified, version: int) -> Ragged:
        """See Books.commit."""
        values, offsets = _native.commit_rows(
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
        return Ragged(values, offsets)

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

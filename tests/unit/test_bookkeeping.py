"""The native books of an engine step against their plain twins: the same plans, tables and counts, to the bit."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.base import DraftBatch, LiveBatch, Price
from slipstream.drafter.calibration import NUM_CELLS
from slipstream.kernels.reference import SamplingRows, Verified
from slipstream.rollout.acceptance import AcceptanceBuffer, AcceptanceModel
from slipstream.rollout.bookkeeping import Books, NativeBooks
from slipstream.rollout.packing import StepPlan
from slipstream.rollout.slots import SlotTable
from slipstream.rollout.types import Request, Sampling

NUM_SLOTS, MAX_LEN, WIDTH, VOCAB = 9, 48, 6, 50
TABLE = ("tokens", "logprobs", "versions", "length", "cached", "rounds", "drafted", "accepted")


def make_table(rng: np.random.Generator) -> SlotTable:
    """Slots taken out of order, some in the middle of their prompts."""
    table = SlotTable(NUM_SLOTS, MAX_LEN)
    for uid in range(int(rng.integers(1, NUM_SLOTS + 1))):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 20)).astype(np.int32)
        slot = table.take()
        table.admit(Request(uid, f"p{uid}", uid, prompt, Sampling(20)), slot)
        table.cached[slot] = len(prompt) - 1 if rng.random() < 0.7 else rng.integers(0, len(prompt))
    for uid in list(table.slot_of)[:-1]:
        if rng.random() < 0.3:
            table.retire(table.slot_of[uid], "stop")
    return table


def make_drafts(rng: np.random.Generator, trees: bool) -> DraftBatch:
    """Drafts of any length, with a token outside the vocabulary here and there."""
    drafts = DraftBatch.empty(NUM_SLOTS, WIDTH)
    drafts.tokens[...] = rng.integers(0, VOCAB + 1, drafts.tokens.shape)
    drafts.count[:] = rng.integers(0, WIDTH + 1, NUM_SLOTS) * (rng.random() < 0.8)
    drafts.source[:] = rng.integers(0, 6, NUM_SLOTS)
    drafts.probs[...] = np.where(rng.random(drafts.probs.shape) < 0.1, np.nan, rng.random(drafts.probs.shape))
    drafts.cells[...] = rng.integers(-1, NUM_CELLS, drafts.cells.shape)
    if trees:
        drafts.parents[...] = [[rng.integers(-1, i) if i else -1 for i in range(WIDTH)] for _ in range(NUM_SLOTS)]
    return drafts


def verify(rng: np.random.Generator, plan: StepPlan) -> Verified:
    """Some of every draft accepted, some responses ended, some rows failed."""
    rows = len(plan.row_drafts)
    count = (rng.integers(0, plan.draft_counts + 2)).astype(np.int32)
    finish = ((rng.random(len(count)) < 0.3) | (count == 0)).astype(np.int8)
    return Verified(rng.integers(0, VOCAB, rows).astype(np.int32), rng.random(rows, np.float32), count, finish)


def same(a: object, b: object) -> bool:
    """Equal arrays of one dtype, or equal values."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), trees=st.booleans(), room=st.integers(0, 60), asks=st.booleans())
def test_plans_tables_and_counts_are_those_of_the_twin(seed: int, trees: bool, room: int, asks: bool) -> None:
    results = []
    for books in (Books(), NativeBooks()):
        rng = np.random.default_rng(seed)
        table, drafts = make_table(rng), make_drafts(rng, trees)
        live = len(table.order)
        limit = np.minimum(rng.integers(0, WIDTH + 1, live), 20).astype(np.int32)
        branching = np.full(live, 3, np.int32) if trees else None
        price = Price(limit, np.zeros(live, np.float32), branching) if asks else None
        if not asks:
            drafts.count[:] = 0
        plan, invalid = books.plan(table, drafts, price, NUM_SLOTS + room, VOCAB)
        verified = verify(rng, plan)
        buffer = AcceptanceBuffer(AcceptanceModel())
        books.observe(buffer, drafts, plan, verified)
        done = books.commit(table, plan, verified, version=7)
        results.append((plan, invalid, done, table, buffer.flush()))
    (plain, invalid, done, table, model), (native, native_invalid, native_done, native_table, native_model) = results
    for field in fields(StepPlan):
        if field.name != "tree":
            assert same(getattr(plain, field.name), getattr(native, field.name)), field.name
    assert (plain.tree is None) == (native.tree is None)
    if plain.tree is not None and native.tree is not None:
        for field in fields(plain.tree):
            assert same(getattr(plain.tree, field.name), getattr(native.tree, field.name)), field.name
    assert invalid == native_invalid
    assert same(done.new.values, native_done.new.values)
    assert same(done.new.offsets, native_done.new.offsets)
    for name in ("rounds", "draft_rounds", "drafted", "accepted"):
        assert same(getattr(done, name), getattr(native_done, name)), name
    for name in TABLE:
        assert same(getattr(table, name), getattr(native_table, name)), name
    assert same(model.seen, native_model.seen)
    assert same(model.accepted, native_model.accepted)
    np.testing.assert_allclose(model.curve, native_model.curve, rtol=1e-12)
    np.testing.assert_allclose(model.squared_error, native_model.squared_error, rtol=1e-12)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_a_step_reads_of_its_slots_is_that_of_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = make_table(rng)
    for slot in table.order:
        table._set_stops(int(slot), tuple(range(int(rng.integers(0, 4)))))
        table.length[slot] = min(table.length[slot] + rng.integers(0, 20), table.end[slot] - 1)
    slots = rng.permutation(table.order)[: rng.integers(0, len(table.order) + 1)]
    wanted = rng.integers(-1, 40, len(table.order)).astype(np.int32)
    plain, native = Books(), NativeBooks()
    batch, native_batch = plain.live_batch(table, slots), native.live_batch(table, slots)
    for field in fields(LiveBatch):
        assert same(getattr(batch, field.name), getattr(native_batch, field.name)), field.name
    rows, native_rows = plain.sampling_rows(table, slots), native.sampling_rows(table, slots)
    for field in fields(SamplingRows):
        assert same(getattr(rows, field.name), getattr(native_rows, field.name)), field.name
    (limit, any_row), (native_limit, native_any) = (b.draft_limits(table, wanted, 16) for b in (plain, native))
    assert same(limit, native_limit)
    assert any_row == native_any == bool((limit > 0).any())
    pending = table.length[table.order] - table.cached[table.order]
    assert (limit[pending > 1] == 0).all()
    assert (limit < np.maximum(table.end - table.length, 1)[table.order]).all()


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    rng = np.random.default_rng(0)
    table, drafts = make_table(rng), DraftBatch.empty(NUM_SLOTS, WIDTH)
    live = len(table.order)
    drafts.count[:] = WIDTH
    table.length[table.order] = MAX_LEN - 2
    table.cached[table.order] = MAX_LEN - 3
    before = table.tokens.copy()
    price = Price(np.full(live, WIDTH, np.int32), np.zeros(live, np.float32))
    with pytest.raises(ValueError, match="a draft reaches beyond its slot"):
        NativeBooks().plan(table, drafts, price, 512, VOCAB)
    plan, _ = NativeBooks().plan(table, drafts, None, 512, VOCAB)
    many = np.full(live, 4, np.int32)
    rows = np.zeros(4 * live, np.int32)
    with pytest.raises(ValueError, match="more new tokens than there is room for"):
        NativeBooks().commit(table, plan, Verified(rows, rows.astype(np.float32), many, many.astype(np.int8)), 0)
    assert np.array_equal(table.tokens, before)

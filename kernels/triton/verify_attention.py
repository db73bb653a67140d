"""Attention of 1 to 32 query tokens per request over the slot KV cache: chains and trees of drafts, in Triton.

Invariants
- Cache layout as in append_kv.py: keys and values [slots, Hkv, L, D]. The query tokens' own keys and values are already
  there, at positions context_len + node; for chains that is plain causality. A request may read the start of its
  context in another slot: only the address of a key changes.
- The rows of one tile are all query heads of a key-value head times the query tokens, so keys are read from memory once
  for all of them (when they do not fit one tile, neighbouring programs read the same keys through the L2 cache).
- Scores, softmax and sums are float32; the keys are split over programs and the parts are combined in a fixed order.
- batch_invariant=True: the tile has a fixed number of rows whatever the width, a split is a fixed number of keys
  counted from position 0, no choice looks at the batch, a hidden key adds exactly 0 and a split without visible keys
  has weight exactly 0. So a token's bits are a function of its query and of the keys and values it sees, by position:
  the same alone, in any batch, with any draft after it, and as the j-th token of a chain. A tree node has these bits
  if its ancestors are nodes 0 to depth - 1; other nodes see their ancestors at other places, and sum in another order.
  The guarantee is per device and build, for finite values at the request's places (written ones, rejected drafts
  included); it needs a matrix unit that treats all rows of a tile alike.
- batch_invariant=False: splits and tiles follow the batch; results agree within rounding only.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from slipstream.kernels.split_plan import FIXED_SPLIT_KEYS, even_split_keys
from slipstream.kernels.triton.append_kv import RequestTable, Schedule, ancestor_masks, check_cache, request_table

if TYPE_CHECKING:
    from slipstream.kernels.triton.step_table import StepTable

__all__ = ["RequestTable", "ancestor_masks", "request_table", "verify_attention", "verify_attention_reference"]

COMBINE_SPLITS = 16
"""Splits that the combining kernel sums at once."""

LOG2_E = math.log2(math.e)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def choose_split_keys(table: RequestTable, window: int, programs_per_key: int, target_programs: int) -> int:
    """Keys of one split so that about target_programs programs share all keys of the batch evenly.

    A few long requests among many short ones are cut finely, because the measure is the batch's sum of keys.
    """
    keys = int((table.contexts + table.widths - table.first_keys(window)).sum())
    return even_split_keys(keys, programs_per_key, target_programs)


def tile_shape(dtype: torch.dtype, head_dim: int) -> tuple[int, int, int]:
    """Rows of a tile under batch_invariant, most rows without it, keys of one block: what fits Hopper's registers.

    64 rows are one full step of its matrix units; float32 has no exact matrix unit and runs on the plain ones.
    """
    if dtype == torch.float32:
        return 32, 32, 16
    return (64, 128, 64) if head_dim <= 128 else (64, 64, 32)


@triton.jit
def _accumulate(
    q: tl.tensor,
    cache: tl.tuple,
    low: tl.tensor,
    high: tl.tensor,
    sight: tl.tuple,
    scales: tl.tuple,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    SHARED: tl.constexpr,
) -> tl.tuple:
    """Online softmax over keys low .. high - 1: unnormalised sums [M, D], peaks [M] (base 2) and weights' sums [M]."""
    key_tile, value_tile, key_row, value_row, shared, key_shift, value_shift = cache
    context, own, floor, depths = sight
    near, lane = tl.arange(0, BLOCK_N), tl.arange(0, q.shape[1])
    peak = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    acc = tl.zeros((q.shape[0], q.shape[1]), tl.float32)
    for at in range(low, high, BLOCK_N):
        column = at + near
        valid = column < high
        key_at, value_at = key_tile + at * key_row, value_tile + at * value_row
        if SHARED:
            key_at += tl.where(column < shared, key_shift, 0)[None, :]
            value_at += tl.where(column < shared, value_shift, 0)[:, None]
        k = tl.load(key_at, mask=valid[None, :] & (lane < HEAD_DIM)[:, None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scales[0]
        if SOFTCAPPED:
            scores = scales[1] * (1.0 - 2.0 / (tl.exp(2.0 * scores) + 1.0))
        column_node = column - context
        drafted = (column_node >= 0) & valid
        bit = (own[:, None] >> tl.where(drafted, column_node, 0)[None, :]) & 1
        seen = (column < context)[None, :] | (drafted[None, :] & (bit != 0))
        if WINDOWED:
            deep = tl.load(depths + column_node, mask=drafted, other=0)
            seen &= tl.where(drafted, context + deep, column)[None, :] > floor[:, None]
        scores = tl.where(seen & valid[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        fade = tl.exp2(peak - pivot)
        weights = tl.exp2(scores - pivot[:, None])
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(value_at, mask=valid[:, None] & (lane < HEAD_DIM)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype).to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit
def _attend_kernel(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    work: tl.tensor,
    spans: tl.tensor,
    tables: tl.tuple,
    key_strides: tl.tuple,
    value_strides: tl.tuple,
    window: tl.tensor,
    inner_scale: tl.tensor,
    outer_scale: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    SHARED: tl.constexpr,
    SINGLE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
) -> None:
    slots, offsets, context_len, ancestors, depths, prefix_slots, prefix_lens = tables
    item, tile, kv_head = tl.program_id(0) // TILES, tl.program_id(0) % TILES, tl.program_id(1)
    request, low, high = tl.load(work + item * 4), tl.load(work + item * 4 + 1), tl.load(work + item * 4 + 2)
    if request < 0:
        return
    start, context = tl.load(offsets + request), tl.load(context_len + request)
    width = tl.load(offsets + request + 1) - start
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    node, head = row // GROUP, kv_head * GROUP + row % GROUP
    live = node < width
    if tile * BLOCK_M >= width * GROUP:
        high = low
    own = tl.load(ancestors + start + node, mask=live, other=0)
    floor = context + tl.load(depths + start + node, mask=live, other=0) - window
    if WINDOWED:
        low = tl.maximum(low, tl.maximum(context - window + 1, 0) // BLOCK_N * BLOCK_N)

    near, lane, num_heads = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.num_programs(1) * GROUP
    place = ((start + node).to(tl.int64) * num_heads + head)[:, None] * HEAD_DIM + lane[None, :]
    mask = live[:, None] & (lane < HEAD_DIM)[None, :]
    q = tl.load(query + place, mask=mask, other=0.0).to(DOT_DTYPE)
    slot, kv_head = tl.load(slots + request).to(tl.int64), kv_head.to(tl.int64)
    key_row, value_row = slot * 0 + key_strides[2], slot * 0 + value_strides[2]
    key_head = keys + slot * key_strides[0] + kv_head * key_strides[1]
    value_head = values + slot * value_strides[0] + kv_head * value_strides[1]
    key_tile = key_head + near[None, :] * key_row + lane[:, None]
    value_tile = value_head + near[:, None] * value_row + lane[None, :]
    shared, away = low * 0, slot * 0
    if SHARED:
        shared, away = tl.load(prefix_lens + request), tl.load(prefix_slots + request).to(tl.int64) - slot
    cache = (key_tile, value_tile, key_row, value_row, shared, away * key_strides[0], away * value_strides[0])
    sight, scales = (context, own, floor, depths + start), (inner_scale, outer_scale)
    acc, peak, total = _accumulate(q, cache, low, high, sight, scales, HEAD_DIM, BLOCK_N, WINDOWED, SOFTCAPPED, SHARED)
    # The only split of a request needs no combining: the same bits, as its weight would be 1.
    if SINGLE or tl.load(spans + request * 3) == tl.load(spans + request * 3 + 1):
        total = tl.where(live, total, 1.0)
        tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        scratch = (tl.load(work + item * 4 + 3) + node).to(tl.int64) * num_heads + head
        tl.store(partial + scratch[:, None] * HEAD_DIM + lane[None, :], acc, mask=mask)
        tl.store(peaks + scratch, peak, mask=live)
        tl.store(sums + scratch, total, mask=live)


@triton.jit
def _combine_kernel(
    out: tl.tensor,
    partial: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    spans: tl.tensor,
    offsets: tl.tensor,
    token_request: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    request = tl.load(token_request + token)
    if request < 0:
        return
    start, stop = tl.load(offsets + request), tl.load(offsets + request + 1)
    first, last = tl.load(spans + request * 3), tl.load(spans + request * 3 + 1)
    if first == last:
        return
    base = tl.load(spans + request * 3 + 2) + token - start
    near, lane = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    # Groups of splits are counted from split 0, whatever the first visible one is: the order of the sum is fixed.
    aligned = first // BLOCK_S * BLOCK_S
    highest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    for at in range(aligned, last + 1, BLOCK_S):
        split = at + near
        inside = (split >= first) & (split <= last)
        place = (base + (split - first) * (stop - start)).to(tl.int64) * NUM_HEADS + head
        highest = tl.maximum(highest, tl.load(peaks + place, mask=inside, other=float("-inf")))
    peak = tl.max(highest, 0)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(aligned, last + 1, BLOCK_S):
        split = at + near
        inside = (split >= first) & (split <= last)
        place = (base + (split - first) * (stop - start)).to(tl.int64) * NUM_HEADS + head
        weight = tl.exp2(tl.load(peaks + place, mask=inside, other=float("-inf")) - peak)
        total += tl.sum(weight * tl.load(sums + place, mask=inside, other=0.0), 0)
        mask = inside[:, None] & (lane < HEAD_DIM)[None, :]
        part = tl.load(partial + place[:, None] * HEAD_DIM + lane[None, :], mask=mask, other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    target = out + row.to(tl.int64) * HEAD_DIM + lane
    tl.store(target, (acc / total).to(out.dtype.element_ty), mask=lane < HEAD_DIM)


def _check(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: RequestTable) -> None:
    check_cache(keys, values)
    if keys.dim() != 4:
        raise ValueError(f"keys: shape {list(keys.shape)}; allowed: [slots, Hkv, L, D]")
    num_slots, kv_heads, length, dim = keys.shape
    num_tokens = len(table.token_request)
    if query.dim() != 3 or query.shape[0] != num_tokens or query.shape[2] != dim:
        raise ValueError(f"query: shape {list(query.shape)}; allowed: [{num_tokens}, Hq, {dim}]")
    if query.dtype != keys.dtype:
        raise ValueError(f"query: dtype {query.dtype}; allowed: the dtype of keys, {keys.dtype}")
    if query.shape[1] == 0 or query.shape[1] % kv_heads:
        raise ValueError(f"query: {query.shape[1]} heads; allowed: a multiple of the cache's {kv_heads}")
    if not query.device == keys.device == table.slot.device:
        raise ValueError(f"query: on {query.device}; allowed: one device with keys ({keys.device}) and the table")
    if table.num_slots_used > num_slots:
        raise ValueError(f"slot: {table.num_slots_used - 1}; allowed: 0 to {num_slots - 1}")
    if (longest := int((table.contexts + table.widths).max(initial=0))) > length:
        raise ValueError(f"context_len: {longest} keys with the query tokens; allowed: up to {length}")


def verify_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: RequestTable,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    *,
    batch_invariant: bool = True,
    target_programs: int = 4 * 132,
    split_keys: int = 0,
) -> torch.Tensor:
    """Attention of T packed query tokens over one layer's cache; one launch, or two when the keys are split.

    query: [T, Hq, D], the rows of a request contiguous in node order; keys, values: [slots, Hkv, L, D] of the same
    dtype; Hq a multiple of Hkv. Node j stands at position context_len + depth(j) and sees the context and its own
    ancestors at positions above that minus window (0: all). scale multiplies the scores; softcap c > 0 bounds them to
    c * tanh(score / c). target_programs: how many programs share the keys without batch_invariant (default: 4 per
    multiprocessor of an H100). split_keys: keys of one split, a multiple of 64 (0: chosen; under batch_invariant a
    constant). Returns [T, Hq, D] in the dtype of query. Raises ValueError with argument, value and what is allowed.
    """
    _check(query, keys, values, table)
    for name, value, lowest, step in (
        ("window", window, 0, 1),
        ("target_programs", target_programs, 1, 1),
        ("split_keys", split_keys, 0, 64),
    ):
        if value < lowest or value % step:
            raise ValueError(f"{name}: {value}; allowed: {lowest} or more" + ", in steps of 64" * (step > 1))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if len(out) == 0:
        return out
    num_rows = query.shape[1] // keys.shape[1] * int(table.widths.max())
    block_m, widest, _ = tile_shape(query.dtype, query.shape[2])
    if not batch_invariant:
        block_m = min(max(triton.next_power_of_2(num_rows), 16), widest)
    tiles = -(-num_rows // block_m)
    if split_keys == 0 and batch_invariant:
        split_keys = FIXED_SPLIT_KEYS
    elif split_keys == 0:
        split_keys = choose_split_keys(table, window, keys.shape[1] * tiles, target_programs)
    plan = table.schedule(window, split_keys)
    launch(query.contiguous(), keys, values, out, table, plan, scale, window, softcap, block_m, tiles)
    return out


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    table: RequestTable | StepTable,
    plan: Schedule,
    scale: float,
    window: int,
    softcap: float,
    block_m: int,
    tiles: int,
) -> None:
    """The kernels without a check; query is contiguous, tiles * block_m covers the widest request's rows."""
    num_tokens, num_heads, dim = query.shape
    kv_heads, block_d = keys.shape[1], max(triton.next_power_of_2(dim), 16)
    block_n = tile_shape(query.dtype, dim)[2]
    rows = 0 if plan.single else plan.scratch_tokens * num_heads
    scratch = torch.empty(rows * (dim + 2), dtype=torch.float32, device=query.device).split([rows * dim, rows, rows])
    prefixes = (table.slot, table.slot) if table.prefix_slot is None else (table.prefix_slot, table.prefix_len)
    dot_dtype = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[query.dtype]
    _attend_kernel[(len(plan.work) * tiles, kv_heads)](
        query,
        keys,
        values,
        out,
        *scratch,
        plan.work,
        plan.spans,
        (table.slot, table.query_offsets, table.context_len, table.ancestors, table.depth, *prefixes),
        keys.stride()[:3],
        values.stride()[:3],
        window,
        scale / softcap if softcap > 0.0 else scale * LOG2_E,
        softcap * LOG2_E,
        GROUP=num_heads // kv_heads,
        HEAD_DIM=dim,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        TILES=tiles,
        WINDOWED=window > 0,
        SOFTCAPPED=softcap > 0.0,
        SHARED=table.prefix_slot is not None,
        SINGLE=plan.single,
        # The interpreter holds bfloat16 as integers and cannot multiply it; its products are exact in float32.
        DOT_DTYPE=tl.float32 if INTERPRETED else dot_dtype,
        num_warps=4 if block_m <= 64 <= block_n else 8,
        num_stages=2,
    )
    if not plan.single:
        tables = (plan.spans, table.query_offsets, table.token_request)
        blocks = {"HEAD_DIM": dim, "BLOCK_D": block_d, "BLOCK_S": COMBINE_SPLITS}
        _combine_kernel[(num_tokens * num_heads,)](out, *scratch, *tables, NUM_HEADS=num_heads, **blocks)


def verify_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: RequestTable,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The plain twin of verify_attention, one query token at a time; float32 within."""
    out = torch.empty_like(query)
    group = query.shape[1] // keys.shape[1]
    token = 0
    for i, (context, width) in enumerate(zip(table.contexts.tolist(), table.widths.tolist(), strict=True)):
        slot = owner = int(table.slot[i])
        shared = 0
        if table.prefix_slot is not None and table.prefix_len is not None:
            owner, shared = int(table.prefix_slot[i]), int(table.prefix_len[i])
        depth = table.depth[token : token + width].tolist()
        for j in range(width):
            mask = int(table.ancestors[token + j])
            floor = context + depth[j] - window if window > 0 else -1
            seen = list(range(max(floor + 1, 0), context))
            seen += [context + n for n in range(width) if mask >> n & 1 and context + depth[n] > floor]
            rows = [owner if at < shared else slot for at in seen]
            k = keys[rows, :, seen].transpose(0, 1).float().repeat_interleave(group, 0)
            v = values[rows, :, seen].transpose(0, 1).float().repeat_interleave(group, 0)
            scores = (k @ query[token + j].float()[:, :, None])[:, :, 0] * scale
            if softcap > 0.0:
                scores = softcap * torch.tanh(scores / softcap)
            out[token + j] = (torch.softmax(scores, -1)[:, None] @ v)[:, 0].to(query.dtype)
        token += width
    return out

"""The slot KV cache as Triton sees it: its layout, the requests of one step, new tokens in, accepted paths kept.

Invariants
- Layout: keys and values are [slots, Hkv, L, D], contiguous in D; the other strides are free. A row of D numbers is
  read by neighbouring threads; the blocked keys of kernels/reference.py exist for the lanes of a CPU.
- One launch writes keys and values; nothing outside the named (slot, position) places is touched.
- A token whose slot or position lies outside the cache is not written: padding rows carry slot -1.
- A RequestTable is checked once, when it is made; its tensors then serve every layer of the step without a check.
- compact_kv reads every row of a path before it writes one, so source and destination may overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import triton
import triton.language as tl

from slipstream.kernels.split_plan import MAX_WIDTH, plan_splits

TABLE_PARTS: tuple[str, ...] = ("slot", "query_offsets", "context_len", "ancestors", "depth", "token_request")


def from_blocked_keys(blocked: torch.Tensor) -> torch.Tensor:
    """Keys of kernels/reference.py, [S, Hkv, L / KEY_BLOCK, D, KEY_BLOCK], as [S, Hkv, L, D]; copies."""
    return blocked.transpose(3, 4).flatten(2, 3).contiguous()


def check_cache(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raises ValueError unless keys and values are [..., slots, Hkv, L, D] of one shape, dtype and device."""
    if keys.shape != values.shape:
        raise ValueError(f"values: shape {list(values.shape)}; allowed: the shape of keys, {list(keys.shape)}")
    if keys.dtype != values.dtype:
        raise ValueError(f"values: dtype {values.dtype}; allowed: the dtype of keys, {keys.dtype}")
    if keys.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"keys: dtype {keys.dtype}; allowed: torch.float32, torch.bfloat16, torch.float16")
    if keys.device != values.device:
        raise ValueError(f"values: on {values.device}; allowed: the device of keys, {keys.device}")
    if not 1 <= keys.shape[-1] <= 256:
        raise ValueError(f"keys: head dimension {keys.shape[-1]}; allowed: 1 to 256")
    for name, cache in (("keys", keys), ("values", values)):
        if cache.stride(-1) != 1:
            raise ValueError(f"{name}: stride {cache.stride(-1)} along D; allowed: 1")


def ancestor_masks(parents: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Which nodes of its own draft each token sees: [T] int32, bit a of token j set iff a = j or a is an ancestor.

    parents: [T] integers, index within the request of the token before it, -1 for the context; offsets: [B + 1].
    Five rounds of pointer doubling cover 32 nodes. Bit 31 is the sign.
    """
    starts, total = offsets[:-1].long(), len(parents)
    first = torch.repeat_interleave(starts, offsets[1:].long() - starts)
    masks = torch.ones(total + 1, dtype=torch.int64, device=parents.device)
    masks[:total] <<= torch.arange(total, device=parents.device) - first
    masks[total] = 0
    jump = torch.full_like(masks, total)
    jump[:total] = torch.where(parents >= 0, first + parents, total)
    for _ in range(5):
        masks, jump = masks | masks[jump], jump[jump]
    return (masks - ((masks >> 31) << 32))[:total].to(torch.int32)


@dataclass(frozen=True, slots=True)
class Schedule:
    """split_plan.SplitPlan on the device. single: no request has more than one split, so that nothing is combined."""

    work: torch.Tensor
    spans: torch.Tensor
    scratch_tokens: int
    single: bool


@dataclass(frozen=True, slots=True, eq=False)
class RequestTable:
    """One step's requests, checked and on the device; made once by request_table and used for every layer.

    slot, context_len: [B]; query_offsets: [B + 1]; ancestors, depth, token_request: [T], all int32 on the device.
    contexts, widths: [B] int64 on the host. prefix_slot, prefix_len: [B] int32 on the device, or None: a request's
    first prefix_len keys lie in prefix_slot.
    """

    slot: torch.Tensor
    query_offsets: torch.Tensor
    context_len: torch.Tensor
    ancestors: torch.Tensor
    depth: torch.Tensor
    token_request: torch.Tensor
    contexts: np.ndarray
    widths: np.ndarray
    num_slots_used: int
    prefix_slot: torch.Tensor | None = None
    prefix_len: torch.Tensor | None = None
    _schedules: dict[tuple[int, int], Schedule] = field(default_factory=dict)

    def first_keys(self, window: int) -> np.ndarray:
        """[B]: the first position that any query token of the request sees."""
        return np.maximum(self.contexts - window + 1, 0) if window > 0 else np.zeros_like(self.contexts)

    def schedule(self, window: int, split_keys: int) -> Schedule:
        """Non-empty splits only, in the order of the requests; one upload per (window, split_keys) and step."""
        key = (window, split_keys)
        if key not in self._schedules:
            plan = plan_splits(self.contexts, self.widths, self.first_keys(window), split_keys)
            packed = np.concatenate([plan.work.ravel(), plan.spans.ravel()])
            work, spans = torch.from_numpy(packed).to(self.slot.device).split([plan.work.size, plan.spans.size])
            single = len(plan.work) == len(plan.spans)
            self._schedules[key] = Schedule(work.view(-1, 4), spans.view(-1, 3), plan.scratch_tokens, single)
        return self._schedules[key]


def request_table(
    slot: torch.Tensor,
    query_offsets: torch.Tensor,
    context_len: torch.Tensor,
    parents: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    prefixes: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> RequestTable:
    """Checks and uploads the requests of one step (tensors on a GPU are read back once).

    slot: [B]; query_offsets: [B + 1], 1 to 32 query tokens per request; context_len: [B], valid keys before the first
    query token; parents: [T], -1 or an earlier node of the same request (None: chains). device: where the cache is,
    default that of slot. prefixes: (slots, lengths), [B] each: whose keys the start of a context is, and how long that
    is. A prompt chunk goes in as several requests with one slot and growing context_len. Raises
    ValueError with argument, value and what is allowed.
    """
    device = slot.device if device is None else torch.device(device)
    host = [np.asarray(t.cpu(), np.int64) for t in (slot, query_offsets, context_len)]
    slots, offsets, contexts = host
    batch, widths = len(slots), np.diff(offsets)
    if offsets.shape != (batch + 1,) or offsets[0] != 0:
        raise ValueError(f"query_offsets: shape {list(offsets.shape)}; allowed: [{batch + 1}], starting with 0")
    if contexts.shape != (batch,):
        raise ValueError(f"context_len: shape {list(contexts.shape)}; allowed: [{batch}]")
    for i in np.flatnonzero((widths < 1) | (widths > MAX_WIDTH)):
        raise ValueError(f"query_offsets: {widths[i]} query tokens of request {i}; allowed: 1 to {MAX_WIDTH}")
    for name, table in (("slot", slots), ("context_len", contexts)):
        if (table < 0).any():
            raise ValueError(f"{name}: {table.min()}; allowed: 0 or more")
    token_request = np.repeat(np.arange(batch), widths)
    node = np.arange(len(token_request)) - np.repeat(offsets[:-1], widths)
    before = node - 1 if parents is None else np.asarray(parents.cpu(), np.int64)
    if before.shape != node.shape:
        raise ValueError(f"parents: shape {list(before.shape)}; allowed: [{len(node)}], the last of query_offsets")
    for t in np.flatnonzero((before < -1) | (before >= node)):
        raise ValueError(f"parents: {before[t]} of token {node[t]}; allowed: -1 to {node[t] - 1}")
    masks = ancestor_masks(torch.from_numpy(before), torch.from_numpy(offsets)).numpy()
    depth = ((masks[:, None] >> np.arange(MAX_WIDTH)) & 1).sum(1) - 1
    parts, names, used = [slots, offsets, contexts, masks, depth, token_request], TABLE_PARTS, slots
    if prefixes is not None:
        owners, lengths = (np.asarray(t.cpu(), np.int64) for t in prefixes)
        for i in np.flatnonzero((owners < 0) | (lengths < 0) | (lengths > contexts)):
            raise ValueError(f"prefixes: {lengths[i]} keys of slot {owners[i]}; allowed: up to {contexts[i]} of a slot")
        parts, names, used = [*parts, owners, lengths], (*names, "prefix_slot", "prefix_len"), np.append(slots, owners)
    packed = torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device)
    views = dict(zip(names, packed.split([len(part) for part in parts]), strict=True))
    return RequestTable(**views, contexts=contexts, widths=widths, num_slots_used=int(used.max(initial=-1)) + 1)


@triton.jit
def _append_kernel(
    keys: tl.tensor,
    values: tl.tensor,
    new_keys: tl.tensor,
    new_values: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    num_slots: tl.tensor,
    length: tl.tensor,
    key_slot_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_row_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_row_stride: tl.tensor,
    new_key_token_stride: tl.tensor,
    new_key_head_stride: tl.tensor,
    new_value_token_stride: tl.tensor,
    new_value_head_stride: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    head = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    lane = tl.arange(0, BLOCK_D)[None, :]
    inside = (slot >= 0) & (slot < num_slots) & (position >= 0) & (position < length)
    mask = (head < KV_HEADS) & (lane < HEAD_DIM) & inside
    key = tl.load(new_keys + token * new_key_token_stride + head * new_key_head_stride + lane, mask=mask)
    value = tl.load(new_values + token * new_value_token_stride + head * new_value_head_stride + lane, mask=mask)
    key_place = slot * key_slot_stride + position * key_row_stride + head * key_head_stride + lane
    value_place = slot * value_slot_stride + position * value_row_stride + head * value_head_stride + lane
    tl.store(keys + key_place, key, mask=mask)
    tl.store(values + value_place, value, mask=mask)


def append_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Writes T tokens into the slot cache of one layer in place; one launch, no synchronisation.

    keys, values: [S, Hkv, L, D]; new_keys, new_values: [T, Hkv, D] of the same dtype, contiguous in D (a transposed
    view of [Hkv, T, D] needs no copy); slots, positions: [T] integers. Tokens with a place outside the cache are
    skipped; of two tokens with one place, either may win. Raises ValueError on a shape, dtype or stride that differs.
    """
    check_cache(keys, values)
    if keys.dim() != 4:
        raise ValueError(f"keys: shape {list(keys.shape)}; allowed: [slots, Hkv, L, D]")
    num_slots, kv_heads, length, dim = keys.shape
    num_tokens = len(slots)
    for name, new in (("new_keys", new_keys), ("new_values", new_values)):
        if new.shape != (num_tokens, kv_heads, dim):
            raise ValueError(f"{name}: shape {list(new.shape)}; allowed: {[num_tokens, kv_heads, dim]}")
        if new.dtype != keys.dtype:
            raise ValueError(f"{name}: dtype {new.dtype}; allowed: the dtype of keys, {keys.dtype}")
        if new.stride(2) != 1:
            raise ValueError(f"{name}: stride {new.stride(2)} along D; allowed: 1")
    if positions.shape != (num_tokens,):
        raise ValueError(f"positions: shape {list(positions.shape)}; allowed: that of slots, [{num_tokens}]")
    if num_tokens == 0:
        return
    _append_kernel[(num_tokens,)](
        keys,
        values,
        new_keys,
        new_values,
        slots.contiguous(),
        positions.contiguous(),
        num_slots,
        length,
        *keys.stride()[:3],
        *values.stride()[:3],
        *new_keys.stride()[:2],
        *new_values.stride()[:2],
        KV_HEADS=kv_heads,
        HEAD_DIM=dim,
        BLOCK_H=triton.next_power_of_2(kv_heads),
        BLOCK_D=triton.next_power_of_2(dim),
        num_warps=4,
    )


@triton.jit
def _compact_kernel(
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    context_len: tl.tensor,
    accepted: tl.tensor,
    counts: tl.tensor,
    key_layer_stride: tl.tensor,
    key_slot_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_row_stride: tl.tensor,
    value_layer_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_row_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    request, head, layer = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    step = tl.arange(0, WIDTH)
    node = tl.load(accepted + request * WIDTH + step)
    moved = (step < tl.load(counts + request)) & (node != step)
    if tl.max(moved.to(tl.int32), 0) > 0:
        slot = tl.load(slots + request).to(tl.int64)
        first = tl.load(context_len + request).to(tl.int64)
        source, target = (first + node)[:, None], (first + step)[:, None]
        lane = tl.arange(0, BLOCK_D)[None, :]
        mask = moved[:, None] & (lane < HEAD_DIM)
        key_base = keys + layer * key_layer_stride + slot * key_slot_stride + head * key_head_stride + lane
        value_base = values + layer * value_layer_stride + slot * value_slot_stride + head * value_head_stride + lane
        key = tl.load(key_base + source * key_row_stride, mask=mask)
        value = tl.load(value_base + source * value_row_stride, mask=mask)
        # Rows are spread over warps: all of them are read before the first is overwritten.
        tl.debug_barrier()
        tl.store(key_base + target * key_row_stride, key, mask=mask)
        tl.store(value_base + target * value_row_stride, value, mask=mask)


def compact_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    slot: torch.Tensor,
    context_len: torch.Tensor,
    accepted: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Moves the keys and values of each request's accepted path to the positions after its context, in place.

    keys, values: [S, Hkv, L, D], or [layers, S, Hkv, L, D] for a whole model in one launch; slot, context_len,
    counts: [B] integers (counts 0 to 32); accepted: [B, 32] integers, the node indices of the path in order (strictly
    increasing, entries beyond counts are ignored). Node accepted[i, j] moves from position context_len[i] +
    accepted[i, j] to context_len[i] + j; other places keep their bytes. A chain (accepted[i, j] = j) moves nothing.
    Each slot may occur once. Raises ValueError on a wrong shape and, for tensors on the CPU, on paths that do not
    increase or leave the cache; on a GPU these are not read back.
    """
    check_cache(keys, values)
    if keys.dim() == 4:
        keys, values = keys[None], values[None]
    if keys.dim() != 5:
        raise ValueError(f"keys: shape {list(keys.shape)}; allowed: [slots, Hkv, L, D] or [layers, slots, Hkv, L, D]")
    num_layers, num_slots, kv_heads, length, dim = keys.shape
    batch = len(slot)
    if accepted.shape != (batch, MAX_WIDTH):
        raise ValueError(f"accepted: shape {list(accepted.shape)}; allowed: {[batch, MAX_WIDTH]}")
    for name, table in (("context_len", context_len), ("counts", counts)):
        if table.shape != (batch,):
            raise ValueError(f"{name}: shape {list(table.shape)}; allowed: [{batch}]")
    if accepted.device.type == "cpu":
        _check_paths(slot, context_len, accepted, counts, num_slots, length)
    if batch == 0 or num_layers == 0:
        return
    _compact_kernel[(batch, kv_heads, num_layers)](
        keys,
        values,
        slot.contiguous(),
        context_len.contiguous(),
        accepted.contiguous(),
        counts.contiguous(),
        *keys.stride()[:4],
        *values.stride()[:4],
        HEAD_DIM=dim,
        WIDTH=MAX_WIDTH,
        BLOCK_D=triton.next_power_of_2(dim),
        num_warps=4,
    )


def _check_paths(
    slot: torch.Tensor,
    context_len: torch.Tensor,
    accepted: torch.Tensor,
    counts: torch.Tensor,
    num_slots: int,
    length: int,
) -> None:
    """Raises ValueError on the first request whose path is not increasing or not inside the cache."""
    slots, contexts, paths, sizes = slot.tolist(), context_len.tolist(), accepted.tolist(), counts.tolist()
    if len(set(slots)) < len(slots):
        raise ValueError(f"slot: {slots} names a slot twice; allowed: each slot once")
    for i, (place, context, path, size) in enumerate(zip(slots, contexts, paths, sizes, strict=True)):
        if not 0 <= size <= MAX_WIDTH:
            raise ValueError(f"counts: {size} of request {i}; allowed: 0 to {MAX_WIDTH}")
        nodes = path[:size]
        if nodes != sorted(set(nodes)) or (nodes and not 0 <= nodes[0] <= nodes[-1] < MAX_WIDTH):
            raise ValueError(f"accepted: {nodes} of request {i}; allowed: strictly increasing, 0 to {MAX_WIDTH - 1}")
        if not 0 <= place < num_slots:
            raise ValueError(f"slot: {place} of request {i}; allowed: 0 to {num_slots - 1}")
        if nodes and not 0 <= context <= length - 1 - nodes[-1]:
            raise ValueError(f"context_len: {context} of request {i}; allowed: 0 to {length - 1 - nodes[-1]}")

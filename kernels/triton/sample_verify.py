"""sample_verify on a GPU: Gumbel-max sampling along drafts. Twin: kernels/reference.py (sample_verify).

Invariants
- Tokens, count and finish equal the twin's, floating-point ties aside (noise.py); log p agrees within 1e-5.
- A row is cut into chunks by the vocabulary alone: no other row, nor their number, touches its token or log p bits
  (a filter in the step, or logits that do not begin on 16 bytes, pick another build, which may round log p otherwise).
- A row is read once: V * itemsize bytes, and 32 bytes a chunk of partial results written and read back. Rows with
  top-k or top-p are read 10 to 19 times more, mostly from the L2 cache, by a kernel that is launched only when a
  request of the step has a filter, and that leaves at once for the other rows.
- Float64 noise is computed only for entries that a float32 ceiling does not rule out (noise.noisy_argmax); the token
  is the exact argmax all the same, ties to the lowest index.
- Filters find a threshold on order-preserving integer keys, four bits a pass, without sorting; of the entries at the
  threshold the first by index are kept. Masses are float64 sums, added in another order than the twin's: an entry can
  be kept by one and not the other only where the mass before it is within that rounding of top_p * total.
- Nothing waits for the device: one copy brings the parameters (device_rows), one brings what was committed (to_host).
"""

# mypy: allow-untyped-defs
# (arguments of kernels are values of the device: no Python type names them)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
import triton
import triton.language as tl

from slipstream.kernels.reference import FINISH_ERROR, FINISH_LENGTH, FINISH_STOP, SamplingRows, Verified
from slipstream.kernels.triton.noise import noise_bits, noisy_argmax

Tile = tuple[int, int]
TILE: Tile = (1024, 4096)
"""Vocabulary entries that a program handles at a time, and in all: 32 programs share a row of 131,072."""
FILTER_BLOCK = 512  # the filter kernel holds 16 float64 values for each entry
MAX_VOCAB = 2**20
ALIGN = 16

STOP: tl.constexpr = tl.constexpr(FINISH_STOP)
LENGTH: tl.constexpr = tl.constexpr(FINISH_LENGTH)
ERROR: tl.constexpr = tl.constexpr(FINISH_ERROR)
NEGATIVE_INFINITY: tl.constexpr = tl.constexpr(float("-inf"))
LOWEST_KEY: tl.constexpr = tl.constexpr(0x007FFFFF)  # _order_key(-inf)
BINS: tl.constexpr = tl.constexpr(16)


@dataclass(frozen=True, slots=True)
class DeviceSamplingRows:
    """reference.SamplingRows on a device, made by device_rows.

    seed, uid: [B] int64, the bit patterns of the unsigned numbers; position, top_k, remaining: [B] int32; temperature,
    top_p: [B] float32; stop_ids: [total] int32; stop_offsets: [B + 1] int32. filtered, known on the host: some request
    samples with top-k or top-p.
    """

    filtered: bool
    seed: torch.Tensor
    uid: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    position: torch.Tensor
    top_k: torch.Tensor
    remaining: torch.Tensor
    stop_ids: torch.Tensor
    stop_offsets: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceVerified:
    """reference.Verified on a device, shapes and dtypes alike: four views of `packed`, which one copy brings over."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    count: torch.Tensor
    finish: torch.Tensor
    packed: torch.Tensor

    def to_host(self) -> Verified:
        """Waits for the device and copies the result: one transfer of about 8 R + 5 B bytes."""
        return unpack_verified(self.packed.cpu(), len(self.tokens), len(self.count))


def _size(spec: list[tuple[int, torch.dtype]]) -> int:
    return sum(-(-length * dtype.itemsize // ALIGN) * ALIGN for length, dtype in spec)


def _views(packed: torch.Tensor, spec: list[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
    starts = [_size(spec[:i]) for i in range(len(spec))]
    return [packed[at : at + n * dtype.itemsize].view(dtype) for at, (n, dtype) in zip(starts, spec, strict=True)]


def _result_spec(num_rows: int, num_requests: int) -> list[tuple[int, torch.dtype]]:
    rows: list[tuple[int, torch.dtype]] = [(num_rows, torch.int32), (num_rows, torch.float32)]
    return [*rows, (num_requests, torch.int32), (num_requests, torch.int8)]


def unpack_verified(packed: torch.Tensor, num_rows: int, num_requests: int) -> Verified:
    """The result in a copy of DeviceVerified.packed on the host; views of it."""
    return Verified(*(view.numpy() for view in _views(packed, _result_spec(num_rows, num_requests))))


def static_rows(views: Mapping[str, torch.Tensor], filtered: bool) -> DeviceSamplingRows:
    """Rows whose tensors are those of `views` with the same names, checked by nobody."""
    names = (field.name for field in fields(DeviceSamplingRows) if field.name != "filtered")
    return DeviceSamplingRows(filtered=filtered, **{name: views[name] for name in names})


def device_rows(rows: SamplingRows, device: torch.device | str) -> DeviceSamplingRows:
    """One transfer, not waited for. Raises ValueError for a temperature not in [0, inf) and a top_p not above 0."""
    device = torch.device(device)
    for value in rows.temperature[~((rows.temperature >= 0) & (rows.temperature < np.inf))]:
        raise ValueError(f"temperature is {value}; allowed: 0 (greedy) or a finite number above")
    for value in rows.top_p[~(rows.top_p > 0)]:
        raise ValueError(f"top_p is {value}; allowed: above 0, 1 keeps every token")
    fields = [np.ascontiguousarray(field, np.uint64).view(np.int64) for field in (rows.seed, rows.uid)]
    fields += [np.ascontiguousarray(field, np.float32) for field in (rows.temperature, rows.top_p)]
    integers = (rows.position, rows.top_k, rows.remaining, rows.stop_ids, rows.stop_offsets)
    fields += [np.ascontiguousarray(field, np.int32) for field in integers]
    sources = [torch.from_numpy(field) for field in fields]
    spec = [(len(source), source.dtype) for source in sources]
    staging = torch.empty(_size(spec), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for view, source in zip(_views(staging, spec), sources, strict=True):
        view.copy_(source)
    filtered = (rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1))
    return DeviceSamplingRows(bool(filtered.any()), *_views(staging.to(device, non_blocking=True), spec))


@triton.jit
def _load_scaled(logits, index, vocab, heat):
    """A block of float32 logits / heat by IEEE division, -inf past the end and where `bad`: NaN or +inf."""
    raw = tl.load(logits + index, mask=index < vocab, other=NEGATIVE_INFINITY).to(tl.float32)
    bad = (raw != raw) | (raw == float("inf"))
    return tl.div_rn(tl.where(bad, NEGATIVE_INFINITY, raw), heat), bad


@triton.jit
def _order_key(value):
    """uint32 keys that order as the float32 values do; both zeros have one key."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _key_value(key):
    """The float32 value of a key."""
    signed = key.to(tl.int32, bitcast=True)
    return (signed ^ (~(signed >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _select(logits, vocab, heat, peak, floor, target, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key from floor up with mass below target above it, and that mass: exp(scaled - peak) each, or 1."""
    bins = tl.arange(0, BINS)
    prefix, above = tl.cast(0, tl.uint32), tl.cast(0.0, tl.float64)
    for level in range(8):
        shift = 28 - 4 * level
        masses = tl.zeros([BINS], tl.float64)
        for start in range(0, vocab, BLOCK):
            index = start + tl.arange(0, BLOCK)
            scaled, _ = _load_scaled(logits, index, vocab, heat)
            key = _order_key(scaled)
            inside = (index < vocab) & (key >= floor) & (((key >> shift) >> 4) == prefix)
            if tl.max(inside.to(tl.int32), 0) > 0:
                digit = ((key >> shift) & (BINS - 1)).to(tl.int32)
                weight = tl.full([BLOCK], 1.0, tl.float64)
                if WEIGHTED:
                    weight = tl.exp(scaled.to(tl.float64) - peak)
                chosen = inside[:, None] & (digit[:, None] == bins[None, :])
                masses += tl.sum(tl.where(chosen, weight[:, None], 0.0), axis=0)
        over = above + tl.sum(tl.where(bins[None, :] > bins[:, None], masses[None, :], 0.0), axis=1)
        digit = tl.min(tl.where((masses > 0.0) & (over < target), bins, BINS - 1), 0)
        above = tl.sum(tl.where(bins == digit, over, 0.0), 0)
        prefix = (prefix << 4) | digit.to(tl.uint32)
    return prefix, above


@triton.jit
def _row_peak(logits, vocab, heat, BLOCK: tl.constexpr):
    """The largest scaled logit (float64), 0 where none is finite."""
    largest = tl.full([BLOCK], NEGATIVE_INFINITY, tl.float32)
    for start in range(0, vocab, BLOCK):
        scaled, _ = _load_scaled(logits, start + tl.arange(0, BLOCK), vocab, heat)
        largest = tl.maximum(largest, scaled)
    peak = tl.max(largest, 0)
    return tl.where(peak == NEGATIVE_INFINITY, 0.0, peak).to(tl.float64)


@triton.jit
def _mass_above(logits, vocab, heat, peak, floor, BLOCK: tl.constexpr):
    """Mass of the keys above floor (float64)."""
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        scaled, _ = _load_scaled(logits, start + tl.arange(0, BLOCK), vocab, heat)
        mass += tl.where(_order_key(scaled) > floor, tl.exp(scaled.to(tl.float64) - peak), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _tie_cutoff(logits, vocab, heat, threshold, num_ties, BLOCK: tl.constexpr):
    """Index of the last of the first num_ties entries whose key is the threshold."""
    seen, cutoff = tl.cast(0, tl.int32), tl.cast(-1, tl.int32)
    for start in range(0, vocab, BLOCK):
        index = start + tl.arange(0, BLOCK)
        scaled, _ = _load_scaled(logits, index, vocab, heat)
        tie = (index < vocab) & (_order_key(scaled) == threshold)
        rank = seen + tl.cumsum(tie.to(tl.int32), 0)
        cutoff = tl.maximum(cutoff, tl.max(tl.where(tie & (rank <= num_ties), index, -1), 0))
        seen += tl.sum(tie.to(tl.int32), 0)
    return cutoff


@triton.jit
def _filter_kernel(
    logits, row_stride, vocab, owner, num_requests, temperature, top_p, top_k, limits, BLOCK: tl.constexpr
):
    """Grid (R): the key and, for entries with that very key, the last index that top-k and top-p keep."""
    row = tl.program_id(0).to(tl.int64)
    request = tl.load(owner + row)
    if request >= num_requests:
        return
    heat, mass_kept, count_kept = tl.load(temperature + request), tl.load(top_p + request), tl.load(top_k + request)
    if (heat == 0.0) | ((count_kept <= 0) & (mass_kept >= 1.0)):
        return
    logits += row * row_stride
    peak = _row_peak(logits, vocab, heat, BLOCK)
    threshold, num_ties = tl.cast(LOWEST_KEY, tl.uint32), tl.cast(vocab, tl.float64)
    if (count_kept > 0) & (count_kept < vocab):
        target = count_kept.to(tl.float64)
        threshold, above = _select(logits, vocab, heat, peak, threshold, target, False, BLOCK)
        num_ties = target - above
    if mass_kept < 1.0:
        floor = threshold
        total = _mass_above(logits, vocab, heat, peak, floor, BLOCK)
        total += num_ties * tl.exp(_key_value(floor).to(tl.float64) - peak)
        target = mass_kept.to(tl.float64) * total
        threshold, above = _select(logits, vocab, heat, peak, floor, target, True, BLOCK)
        weight = tl.exp(_key_value(threshold).to(tl.float64) - peak)
        whole = tl.floor((target - above) / weight)
        num_ties = whole + tl.where(above + whole * weight < target, 1.0, 0.0)
    num_ties = tl.minimum(num_ties, tl.cast(vocab, tl.float64)).to(tl.int32)
    tl.store(limits + row, threshold.to(tl.int32, bitcast=True))
    tl.store(limits + tl.num_programs(0) + row, _tie_cutoff(logits, vocab, heat, threshold, num_ties, BLOCK))


@triton.jit
def _running_argmax(scaled, start, best, token, greedy, seed, uid, position, BLOCK: tl.constexpr):
    """The best noisy value and its index after one more block; the earlier block wins a tie."""
    if greedy:
        value, lane = tl.max(scaled, 0, return_indices=True)
        lane = tl.where(value > best, lane, -1)
        best = tl.maximum(value, best)
    else:
        best, lane = noisy_argmax(scaled, noise_bits(seed, uid, position, start, BLOCK), best, BLOCK)
    return best, tl.where(lane >= 0, start + lane, token)


@triton.jit
def _scan_kernel(
    logits, row_stride, vocab, owner, num_requests, offsets, seed, uid, position, temperature, top_p, top_k,
    limits, partial, winners, FILTERED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R, S): best noisy value, peak and sum of exp(scaled - peak) of a chunk; winner -1 where a logit is bad."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request = tl.load(owner + row)
    if request >= num_requests:
        return
    temper = tl.load(temperature + request)
    heat = tl.where(temper == 0.0, 1.0, temper)
    place = tl.load(position + request) + (row - tl.load(offsets + request)).to(tl.int32)
    seed_word, uid_word = tl.load(seed + request), tl.load(uid + request)
    if FILTERED:
        count_kept, mass_kept = tl.load(top_k + request), tl.load(top_p + request)
        filtered = (temper != 0.0) & ((count_kept > 0) | (mass_kept < 1.0))
        threshold = tl.load(limits + row).to(tl.uint32, bitcast=True)
        cutoff = tl.load(limits + tl.num_programs(0) + row)
    best, token = tl.cast(NEGATIVE_INFINITY, tl.float32), tl.cast(0, tl.int32)
    peak, mass = tl.cast(NEGATIVE_INFINITY, tl.float32), tl.cast(0.0, tl.float32)
    any_bad = tl.zeros([BLOCK], tl.int32)
    first = split * CHUNK
    for start in tl.range(first, tl.minimum(first + CHUNK, vocab), BLOCK, num_stages=3):
        index = start + tl.arange(0, BLOCK)
        scaled, bad = _load_scaled(logits + row * row_stride, index, vocab, heat)
        any_bad |= bad.to(tl.int32)
        if FILTERED:
            key = _order_key(scaled)
            keep = (key > threshold) | ((key == threshold) & (index <= cutoff))
            scaled = tl.where(keep | (not filtered), scaled, NEGATIVE_INFINITY)
        higher = tl.maximum(peak, tl.max(scaled, 0))
        shift = tl.where(higher == NEGATIVE_INFINITY, 0.0, higher)
        mass = mass * tl.exp(peak - shift) + tl.sum(tl.exp(scaled - shift), 0)
        peak = higher
        best, token = _running_argmax(scaled, start, best, token, temper == 0.0, seed_word, uid_word, place, BLOCK)
    at, plane = row * tl.num_programs(1) + split, tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(partial + at, best)
    tl.store(partial + plane + at, peak)
    tl.store(partial + 2 * plane + at, mass)
    tl.store(winners + at, tl.where(tl.max(any_bad, 0) > 0, -1, token))


@triton.jit
def _combine(
    logits, row_stride, row, inside, temper, partial, winners, num_rows, num_splits,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Token, float32 log p and error flag of `ROWS` rows from their chunks."""
    lane = tl.arange(0, SPLITS)[None, :]
    at = row[:, None] * num_splits + lane
    live = inside[:, None] & (lane < num_splits)
    plane = tl.cast(num_rows, tl.int64) * num_splits
    winner = tl.load(winners + at, mask=live, other=0)
    peaks = tl.load(partial + plane + at, mask=live, other=NEGATIVE_INFINITY)
    masses = tl.load(partial + 2 * plane + at, mask=live, other=0.0)
    split = tl.argmax(tl.load(partial + at, mask=live, other=NEGATIVE_INFINITY), 1)
    token = tl.sum(tl.where(lane == split[:, None], winner, 0), 1)
    highest = tl.max(peaks, 1)
    bad = (tl.min(winner, 1) < 0) | (highest == NEGATIVE_INFINITY)
    peak = tl.where(bad, 0.0, highest).to(tl.float64)
    weights = tl.where(bad[:, None], 1.0, tl.exp(peaks.to(tl.float64) - peak[:, None]))
    mass = tl.sum(masses.to(tl.float64) * weights, 1)
    raw = tl.load(logits + row * row_stride + token, mask=inside & (bad == 0), other=0.0).to(tl.float32)
    scaled = tl.div_rn(raw, tl.where(temper == 0.0, 1.0, temper))
    logprob = (scaled.to(tl.float64) - peak - tl.log(tl.where(bad, 1.0, mass))).to(tl.float32)
    return token, tl.where(temper == 0.0, 0.0, logprob), bad


@triton.jit
def _verify_kernel(
    logits, row_stride, offsets, drafts, temperature, remaining, stop_ids, stop_offsets, partial, winners, num_rows,
    num_splits, tokens, logprobs, count, finish, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (B): combines the chunks of a request's rows and keeps the agreed prefix and the first differing token."""
    request = tl.program_id(0)
    first, last = tl.load(offsets + request), tl.load(offsets + request + 1)
    temper, allowed = tl.load(temperature + request), tl.load(remaining + request)
    lane = tl.arange(0, ROWS)
    begin, committed, code, running = first, tl.cast(0, tl.int32), tl.cast(0, tl.int32), tl.cast(1, tl.int32)
    while (begin < last) & (running > 0):
        row = begin + lane
        inside = row < last
        token, logprob, bad = _combine(
            logits, row_stride, row, inside, temper, partial, winners, num_rows, num_splits, ROWS, SPLITS
        )
        stops = lane < 0
        for place in range(tl.load(stop_offsets + request), tl.load(stop_offsets + request + 1)):
            stops = stops | (token == tl.load(stop_ids + place))
        long = (row - first + 1) >= allowed
        codes = tl.where(bad, ERROR, tl.where(stops, STOP, tl.where(long, LENGTH, 0)))
        ends = inside & ((codes > 0) | (token != tl.load(drafts + row, mask=inside, other=-1)))
        end = tl.min(tl.where(ends, lane, ROWS), 0)
        kept = inside & ((lane < end) | ((lane == end) & (bad == 0)))
        tl.store(tokens + row, token, mask=kept)
        tl.store(logprobs + row, logprob, mask=kept)
        committed += tl.sum(kept.to(tl.int32), 0)
        code = tl.sum(tl.where(lane == end, codes, 0), 0)
        running = (end == ROWS).to(tl.int32)
        begin += ROWS
    tl.store(count + request, committed)
    tl.store(finish + request, code.to(tl.int8))


def _check(logits: torch.Tensor, offsets: torch.Tensor, drafts: torch.Tensor, rows: DeviceSamplingRows) -> None:
    shape, bounds = tuple(logits.shape), len(rows.seed) + 1
    if logits.ndim != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits have shape {shape}, strides {logits.stride()}; allowed: [R, V], rows contiguous")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype}; allowed: torch.float32, torch.bfloat16, torch.float16")
    if not 1 <= shape[1] <= MAX_VOCAB:
        raise ValueError(f"the vocabulary holds {shape[1]} entries; allowed: 1 to {MAX_VOCAB}")
    if offsets.dtype != torch.int64 or offsets.shape != (bounds,):
        raise ValueError(f"offsets are {offsets.dtype} {tuple(offsets.shape)}; allowed: torch.int64 ({bounds},)")
    if drafts.dtype != torch.int32 or drafts.shape != shape[:1]:
        raise ValueError(f"drafts are {drafts.dtype} {tuple(drafts.shape)}; allowed: torch.int32 ({shape[0]},)")


def sample_verify(
    logits: torch.Tensor, offsets: torch.Tensor, drafts: torch.Tensor, rows: DeviceSamplingRows, tile: Tile = TILE
) -> DeviceVerified:
    """reference.sample_verify on the device of the logits, without waiting for it.

    logits: [R, V] float32, bfloat16 or float16, any row stride; offsets: [B + 1] int64, rising, not above R (their
    values are not checked: they stay on the device); drafts: [R] int32. Rows outside every request are left out.
    tile: block (a power of two, at least 4) and chunk (a multiple of it); they decide how log p is rounded, so a run
    keeps to one. Raises ValueError for wrong shapes or dtypes and a vocabulary above MAX_VOCAB.
    """
    _check(logits, offsets, drafts, rows)
    (num_rows, vocab), num_requests, device, (block, chunk) = logits.shape, len(rows.seed), logits.device, tile
    spec = _result_spec(num_rows, num_requests)
    packed = torch.zeros(_size(spec), dtype=torch.uint8, device=device)
    tokens, logprobs, count, finish = _views(packed, spec)
    out = DeviceVerified(tokens, logprobs, count, finish, packed)
    if num_rows == 0 or num_requests == 0:
        return out
    splits = triton.cdiv(vocab, chunk)
    partial = torch.empty((3, num_rows, splits), dtype=torch.float32, device=device)
    winners = torch.empty((num_rows, splits), dtype=torch.int32, device=device)
    limits = torch.empty((2, num_rows), dtype=torch.int32, device=device)
    owner = torch.searchsorted(offsets[1:], torch.arange(num_rows, device=device), right=True, out_int32=True)
    shared = (logits, logits.stride(0), vocab, owner, num_requests)
    knobs = (rows.temperature, rows.top_p, rows.top_k, limits)
    with torch.cuda.device_of(logits):
        if rows.filtered:
            _filter_kernel[(num_rows,)](*shared, *knobs, BLOCK=min(block, FILTER_BLOCK), num_warps=16)
        _scan_kernel[(num_rows, splits)](
            *shared, offsets, rows.seed, rows.uid, rows.position, *knobs, partial, winners,
            FILTERED=rows.filtered, CHUNK=chunk, BLOCK=block, num_warps=4,
        )  # fmt: skip
        _verify_kernel[(num_requests,)](
            logits, logits.stride(0), offsets, drafts, rows.temperature, rows.remaining, rows.stop_ids,
            rows.stop_offsets, partial, winners, num_rows, splits, tokens, logprobs, count, finish,
            ROWS=8, SPLITS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return out

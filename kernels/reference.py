"""The plain twin of every kernel: the specification that fast paths are tested against.

Invariants
- Noise is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) with key = seed and
  counter = (vocabulary index // 4, position, uid low word, uid high word): a pure function of
  (seed, uid, position, vocabulary index), equal on every device.
- The token at a position is argmax(filtered_logits / T + gumbel): a draft is accepted iff it equals that token, so
  no draft, batch or schedule can change a sample (law 1).
- log p belongs to the distribution really sampled: after temperature, top-k and top-p (law 2). Greedy sampling is a
  point mass: log p = 0.
- Row i of a batch is computed without regard to any other row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

PHILOX_M0, PHILOX_M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
MASK32 = np.uint64(0xFFFFFFFF)

KEY_BLOCK = 16
"""Positions that lie side by side in the key cache: the lanes of the native kernel."""

TWIN_ROWS = 16
"""The twin's products run on so many rows at a time: how a library sums may depend on the number of rows."""

FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_ERROR = range(4)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32. counter: [n, 4] uint32; key: two 32-bit words; returns [n, 4] uint32."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & MASK32,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & MASK32,
        )
        k0, k1 = (k0 + PHILOX_W0) & 0xFFFFFFFF, (k1 + PHILOX_W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel(seed: int, uid: int, position: int, vocab_size: int) -> np.ndarray:
    """Gumbel(0, 1) noise of one position: [vocab_size] float32.

    A 32-bit word b becomes u = (b + 1/2) / 2**32 in float64 (never 0 or 1), then -log(-log(u)), rounded once.
    """
    blocks = -(-vocab_size // 4)
    counter = np.empty((blocks, 4), np.uint32)
    counter[:, 0] = np.arange(blocks)
    counter[:, 1] = position
    counter[:, 2] = uid & 0xFFFFFFFF
    counter[:, 3] = uid >> 32
    bits = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)[:vocab_size]
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-32
    return (-np.log(-np.log(uniform))).astype(np.float32)


def filter_mask(scaled: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens may be sampled: [V] bool. scaled: [V] float32 logits / T.

    top-k first, then top-p on what is left: the smallest prefix, by falling probability (ties: lower index first),
    whose mass reaches top_p.
    """
    order = np.argsort(-scaled, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1.0:
        weight = np.exp(scaled[order].astype(np.float64) - float(scaled[order[0]]))
        before = np.cumsum(weight) - weight
        order = order[before < float(top_p) * weight.sum()]
    mask = np.zeros(len(scaled), bool)
    mask[order] = True
    return mask


def sample_row(
    logits: np.ndarray, seed: int, uid: int, position: int, temperature: float, top_k: int, top_p: float
) -> tuple[int, float]:
    """One token and its log p. logits: [V] float32. Raises ValueError when no logit is finite or one is NaN."""
    if np.isnan(logits).any() or np.isposinf(logits).any() or not np.isfinite(logits.max()):
        raise ValueError("logits hold NaN or +inf, or no finite value")
    if temperature == 0.0:
        return int(np.argmax(logits)), 0.0
    scaled = logits.astype(np.float32) / np.float32(temperature)
    noisy = scaled + gumbel(seed, uid, position, len(scaled))
    if top_k > 0 or top_p < 1.0:
        mask = filter_mask(scaled, top_k, top_p)
        noisy = np.where(mask, noisy, -np.inf)
        kept = scaled[mask]
    else:
        kept = scaled
    token = int(np.argmax(noisy))
    peak = float(scaled.max())
    mass = np.exp(kept.astype(np.float64) - peak).sum()
    return token, float(scaled[token]) - peak - math.log(mass)


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of the live requests as flat arrays, one row per request.

    seed, uid: [B] uint64; position: [B] int32, response index of the first token to sample; temperature, top_p: [B]
    float32; top_k: [B] int32; remaining: [B] int32, tokens still allowed, at least 1; stop_ids: [total] int32 and
    stop_offsets: [B + 1] int32.
    """

    seed: np.ndarray
    uid: np.ndarray
    position: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    remaining: np.ndarray
    stop_ids: np.ndarray
    stop_offsets: np.ndarray


@dataclass(frozen=True, slots=True)
class Verified:
    """What one step committed: tokens [R] int32 and logprobs [R] float32 (of row offsets[i] + j for the j-th new
    token of request i), count [B] int32 and finish [B] int8 (FINISH_*). path: [R] int32, only where trees were
    verified: at the same places, the row of its request that the token was sampled at."""

    tokens: np.ndarray
    logprobs: np.ndarray
    count: np.ndarray
    finish: np.ndarray
    path: np.ndarray | None = None


def sample_verify(
    logits: np.ndarray,
    offsets: np.ndarray,
    drafts: np.ndarray,
    rows: SamplingRows,
    parents: np.ndarray | None = None,
) -> Verified:
    """Samples the target along each draft and keeps the agreed prefix plus the first differing token.

    logits: [R, V] float32; request i owns rows offsets[i]:offsets[i + 1] (at least one). Row j of a request belongs to
    its draft token j - 1, row 0 to its last token; drafts: [R] int32, the draft token of the next row, -1 after the
    last. parents: [R] int32, the row of the request that comes before each (-1 for its first): a tree, of which the
    sampled path is kept; None: each row follows the one before it.
    """
    num_rows, num_requests = len(logits), len(offsets) - 1
    tokens, logprobs = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.float32)
    count, finish = np.zeros(num_requests, np.int32), np.zeros(num_requests, np.int8)
    path = None if parents is None else np.zeros(num_rows, np.int32)
    for i in range(num_requests):
        stops = rows.stop_ids[rows.stop_offsets[i] : rows.stop_offsets[i + 1]]
        first, size = int(offsets[i]), int(offsets[i + 1] - offsets[i])
        before = np.arange(-1, size - 1) if parents is None else parents[first : first + size]
        at = 0
        while at >= 0:
            try:
                token, logprob = sample_row(
                    logits[first + at],
                    int(rows.seed[i]),
                    int(rows.uid[i]),
                    int(rows.position[i]) + int(count[i]),
                    float(rows.temperature[i]),
                    int(rows.top_k[i]),
                    float(rows.top_p[i]),
                )
            except ValueError:
                finish[i] = FINISH_ERROR
                break
            here = first + int(count[i])
            tokens[here], logprobs[here] = token, logprob
            if path is not None:
                path[here] = at
            count[i] += 1
            if token in stops:
                finish[i] = FINISH_STOP
            elif count[i] >= rows.remaining[i]:
                finish[i] = FINISH_LENGTH
            if finish[i]:
                break
            agreed = [row for row in range(1, size) if before[row] == at and drafts[first + row - 1] == token]
            at = agreed[0] if agreed else -1
    return Verified(tokens, logprobs, count, finish, path)


def append_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Writes T tokens into the slot cache in place.

    keys: [S, Hkv, L / KEY_BLOCK, D, KEY_BLOCK]: KEY_BLOCK neighbouring positions side by side; values: [S, Hkv, L, D];
    new_keys, new_values: [T, Hkv, D]; slots, positions: [T] int64.
    """
    keys[slots, :, positions // KEY_BLOCK, :, positions % KEY_BLOCK] = new_keys
    values[slots, :, positions, :] = new_values


def move_kv(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, source: torch.Tensor, target: torch.Tensor
) -> None:
    """Moves tokens to other places of their slots; slots, source, target: [n] int64; a place may be in both."""
    keys[slots, :, target // KEY_BLOCK, :, target % KEY_BLOCK] = keys[
        slots, :, source // KEY_BLOCK, :, source % KEY_BLOCK
    ]
    values[slots, :, target, :] = values[slots, :, source, :]


def places_by_position(places: torch.Tensor, positions: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """[T, longest] int64: where each token finds positions 0, 1, ... up to its own; beyond that, anything."""
    out = torch.arange(int(positions.max()) + 1).repeat(len(places), 1)
    for token, position in enumerate(positions.tolist()):
        at = token
        while int(places[at]) != position:
            out[token, position] = places[at]
            at, position = int(parents[at]), position - 1
    return out


def ragged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    places: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    positions: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
    prefix_slots: torch.Tensor | None = None,
    prefix_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of T packed tokens, each over its own slot.

    query: [T, H, D]; keys, values: as in append_kv; slots, places: [T] int64. Token t attends to positions
    max(0, p - window + 1) .. p of slot slots[t] (window 0: all), its own key included. Query head h reads key-value
    head h // (H / Hkv). softcap c > 0 bounds the scores to c * tanh(score / c) (Gemma 2). Returns [T, H, D].

    A token's position is its place, but in draft trees: there positions and parents are [T] int64, parents the token
    before, in this pass, of each token whose place is not its position; a token attends to its path.

    prefix_slots, prefix_lens: [S] int64, or None for no sharing: a slot reads positions below prefix_lens in the slot
    prefix_slots, whose they are; its own tokens lie behind them.
    """
    num_tokens, num_heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.view(num_tokens, kv_heads, num_heads // kv_heads, head_dim)
    furthest = int(places.max()) + 1
    blocks = keys[slots, :, : -(-furthest // KEY_BLOCK)]
    by_position, read = blocks.transpose(2, 3).flatten(3)[..., :furthest], values[slots, :, :furthest]
    if prefix_slots is not None and prefix_lens is not None:
        owners, inside = prefix_slots[slots], torch.arange(furthest, device=slots.device) < prefix_lens[slots, None]
        theirs = keys[owners, :, : -(-furthest // KEY_BLOCK)].transpose(2, 3).flatten(3)[..., :furthest]
        by_position = torch.where(inside[:, None, None, :], theirs, by_position)
        read = torch.where(inside[:, None, :, None], values[owners, :, :furthest], read)
    if positions is None or parents is None:
        positions, longest = places, furthest
    else:
        index = places_by_position(places, positions, parents)[:, None, None, :]
        longest = index.shape[-1]
        by_position = by_position.gather(3, index.expand(-1, kv_heads, head_dim, -1))
        read = read.gather(2, index.transpose(2, 3).expand(-1, kv_heads, -1, head_dim))
    scores = torch.matmul(grouped, by_position.to(query.dtype)) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(longest, device=query.device)
    hidden = at[None, :] > positions[:, None]
    if window > 0:
        hidden |= at[None, :] <= positions[:, None] - window
    scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out = torch.matmul(weights, read.to(query.dtype))
    return out.reshape(num_tokens, num_heads, head_dim)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias in float32, rounded once to the dtype of x. x: [..., K]; weight: [N, K]; bias: [N]."""
    rows = x.reshape(-1, x.shape[-1]).float()
    padded, factor = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % TWIN_ROWS)), weight.float().T
    parts = [part @ factor for part in padded.split(TWIN_ROWS)]
    out = torch.cat(parts)[: len(rows)] if parts else padded @ factor
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], len(weight))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool = False, round_first: bool = True
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) times the weight over the last axis; the two switches are those of kernels.linear."""
    value = x.float()
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if round_first:
        value = value.to(x.dtype).float()
    return (value * (weight.float() + float(unit_offset))).to(x.dtype)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise: what lies between the products of a gated feed-forward layer."""
    return torch.nn.functional.silu(gate) * up

"""Samples as the learner sees them, and micro-batches of them: padded rows, or one packed row.

Invariants: the divisor of a loss is the update's token count, never the micro-batch's; samples without advantage signal
stay in (they carry KL and entropy, and the token mean counts them); in both layouts the arrays of the loss have one row
for each sample; a micro-batch of no sample has one row that counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TrainSample:
    """prompt, response: int32 tokens; logprobs: [len(response)] float32 as sampled; advantage: one number.

    Set by the correction, [len(response)] each, None where there is none: proximal, float32 log-probabilities of the
    learner before its first update; weights, float32 importance weights; keep, bool, the tokens to train on.
    """

    prompt: np.ndarray
    response: np.ndarray
    logprobs: np.ndarray
    advantage: float
    proximal: np.ndarray | None = None
    weights: np.ndarray | None = None
    keep: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens to train on."""
        return len(self.response) if self.keep is None else int(self.keep.sum())


@dataclass(frozen=True, slots=True)
class LossRows:
    """What the loss needs besides the model's log-probabilities: [B, L] arrays, one row for each sample.

    mask: bool, the tokens to train on. old_logp (what the ratio is taken against), rollout_logp (as sampled), weights
    (1 without a correction): float32, aligned with mask. advantages: [B, 1] float32. order: the samples' places in
    the list that was cut. first: the column of each sample's first response token.
    """

    mask: np.ndarray
    old_logp: np.ndarray
    rollout_logp: np.ndarray
    weights: np.ndarray
    advantages: np.ndarray
    order: list[int]
    first: list[int]


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """[B, L] arrays, right-padded; a column of `rows` marks positions whose *next* token is a response token.

    input_ids, targets: int64; attention: bool, real tokens.
    """

    rows: LossRows
    input_ids: np.ndarray
    attention: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens of all samples, one after the other; a column of `rows` is a response token.

    input_ids, position_ids: [1, T] int64; lengths: tokens of each sample. predicting: [R] int64, the positions whose
    next token is a response token; targets: [R] int64, those tokens. place: [B, L] int64 into R, 0 outside responses.
    """

    rows: LossRows
    input_ids: np.ndarray
    position_ids: np.ndarray
    lengths: tuple[int, ...]
    predicting: np.ndarray
    targets: np.ndarray
    place: np.ndarray


def split_updates(num_samples: int, num_updates: int) -> list[np.ndarray]:
    """Sample indices of each optimiser update: interleaved, so that every update sees every group."""
    return [np.arange(start, num_samples, num_updates) for start in range(min(num_updates, num_samples))]


def sequence_lengths(samples: list[TrainSample]) -> list[int]:
    """Tokens of each sample, prompt included."""
    return [len(sample.prompt) + len(sample.response) for sample in samples]


def pad(samples: list[TrainSample], order: list[int]) -> PaddedBatch:
    """The samples at the places `order`, one to a row."""
    chosen = _chosen(samples, order)
    lengths = sequence_lengths(chosen)
    shape = (len(chosen), max(lengths))
    batch = PaddedBatch(
        rows=_rows(chosen, order, shape[1], [len(sample.prompt) - 1 for sample in chosen]),
        input_ids=np.zeros(shape, np.int64),
        attention=np.zeros(shape, bool),
        targets=np.zeros(shape, np.int64),
    )
    for row, (sample, length) in enumerate(zip(chosen, lengths, strict=True)):
        first = len(sample.prompt)
        batch.input_ids[row, :first] = sample.prompt
        batch.input_ids[row, first:length] = sample.response
        batch.attention[row, :length] = True
        batch.targets[row, first - 1 : length - 1] = sample.response
    return batch


def pack(samples: list[TrainSample], order: list[int]) -> PackedBatch:
    """The samples at the places `order`, side by side."""
    chosen = _chosen(samples, order)
    lengths, num_responses = sequence_lengths(chosen), [len(sample.response) for sample in chosen]
    starts = np.cumsum([0, *lengths[:-1]])
    place = np.zeros((len(chosen), max(num_responses)), np.int64)
    for row, (first, count) in enumerate(zip(np.cumsum([0, *num_responses[:-1]]), num_responses, strict=True)):
        place[row, :count] = np.arange(first, first + count)
    tokens = [part for sample in chosen for part in (sample.prompt, sample.response)]
    return PackedBatch(
        rows=_rows(chosen, order, place.shape[1], [0] * len(chosen)),
        input_ids=np.concatenate(tokens).astype(np.int64)[None],
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])[None],
        lengths=tuple(lengths),
        predicting=np.concatenate(
            [
                np.arange(start + len(sample.prompt) - 1, start + length - 1, dtype=np.int64)
                for start, sample, length in zip(starts, chosen, lengths, strict=True)
            ]
        ),
        targets=np.concatenate([sample.response for sample in chosen]).astype(np.int64),
        place=place,
    )


def _chosen(samples: list[TrainSample], order: list[int]) -> list[TrainSample]:
    """One token after another that nobody trains on stands for no sample: a model needs something to run on."""
    token = np.zeros(1, np.int32)
    nothing = TrainSample(token, token, np.zeros(1, np.float32), 0.0, keep=np.zeros(1, bool))
    return [samples[i] for i in order] or [nothing]


def _rows(samples: list[TrainSample], order: list[int], width: int, first: list[int]) -> LossRows:
    shape = (len(samples), width)
    rows = LossRows(
        mask=np.zeros(shape, bool),
        old_logp=np.zeros(shape, np.float32),
        rollout_logp=np.zeros(shape, np.float32),
        weights=np.ones(shape, np.float32),
        advantages=np.zeros((len(samples), 1), np.float32),
        order=order,
        first=first,
    )
    for row, (sample, start) in enumerate(zip(samples, first, strict=True)):
        here = row, slice(start, start + len(sample.response))
        rows.mask[here] = True if sample.keep is None else sample.keep
        rows.rollout_logp[here] = sample.logprobs
        rows.old_logp[here] = sample.logprobs if sample.proximal is None else sample.proximal
        if sample.weights is not None:
            rows.weights[here] = sample.weights
        rows.advantages[row] = sample.advantage
    return rows

"""Samples as the learner sees them: flat arrays, and their cut into padded micro-batches.

Invariants: a sample with tokens to train on is in exactly one micro-batch; the divisor of a loss is the update's token
count, never the micro-batch's; samples without advantage signal stay in (they carry KL and entropy, and the token mean
counts them).
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
class MicroBatch:
    """[B, L] arrays, right-padded. mask marks positions whose *next* token is a response token to train on.

    input_ids, targets: int64; attention: bool, real tokens; old_logp (what the ratio is taken against), rollout_logp
    (as sampled), weights (1 without a correction), advantages: float32, aligned with mask. order: [B] the samples'
    places in the list that was cut.
    """

    input_ids: np.ndarray
    attention: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    old_logp: np.ndarray
    rollout_logp: np.ndarray
    weights: np.ndarray
    advantages: np.ndarray
    order: list[int]


def split_updates(num_samples: int, num_updates: int) -> list[np.ndarray]:
    """Sample indices of each optimiser update: interleaved, so that every update sees every group."""
    return [np.arange(start, num_samples, num_updates) for start in range(min(num_updates, num_samples))]


def micro_batches(samples: list[TrainSample], max_tokens: int) -> list[MicroBatch]:
    """Cuts samples into batches of at most `max_tokens` padded tokens (a longer single sample goes alone).

    Sorted by length, so that padding is small; deterministic.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt) + len(samples[i].response))
    batches: list[list[int]] = []
    for i in order:
        length = len(samples[i].prompt) + len(samples[i].response)
        if not batches or (len(batches[-1]) + 1) * length > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return [_pad([samples[i] for i in batch], batch) for batch in batches]


def _pad(samples: list[TrainSample], order: list[int]) -> MicroBatch:
    rows, width = len(samples), max(len(s.prompt) + len(s.response) for s in samples)
    shape = (rows, width)
    batch = MicroBatch(
        input_ids=np.zeros(shape, np.int64),
        attention=np.zeros(shape, bool),
        targets=np.zeros(shape, np.int64),
        mask=np.zeros(shape, bool),
        old_logp=np.zeros(shape, np.float32),
        rollout_logp=np.zeros(shape, np.float32),
        weights=np.ones(shape, np.float32),
        advantages=np.zeros((rows, 1), np.float32),
        order=order,
    )
    for row, sample in enumerate(samples):
        first, last = len(sample.prompt), len(sample.prompt) + len(sample.response)
        batch.input_ids[row, :first] = sample.prompt
        batch.input_ids[row, first:last] = sample.response
        batch.attention[row, :last] = True
        here = row, slice(first - 1, last - 1)
        batch.targets[here] = sample.response
        batch.mask[here] = True if sample.keep is None else sample.keep
        batch.rollout_logp[here] = sample.logprobs
        batch.old_logp[here] = sample.logprobs if sample.proximal is None else sample.proximal
        if sample.weights is not None:
            batch.weights[here] = sample.weights
        batch.advantages[row] = sample.advantage
    return batch

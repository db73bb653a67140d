"""Samples as the learner sees them: flat arrays, and their cut into padded micro-batches.

Invariants: a sample is trained on in exactly one micro-batch; the divisor of a loss is the update's token count, never
the micro-batch's; samples without advantage signal stay in (they carry KL and entropy, and the token mean counts them).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class TrainSample:
    """prompt, response: int32 tokens; logprobs: [len(response)] float32 as sampled; advantage: one number."""

    prompt: np.ndarray
    response: np.ndarray
    logprobs: np.ndarray
    advantage: float


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """[B, L] arrays, right-padded. mask marks positions whose *next* token is a response token to train on.

    input_ids, targets: int64; attention: bool, real tokens; old_logp, advantages: float32, aligned with mask.
    """

    input_ids: np.ndarray
    attention: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    old_logp: np.ndarray
    advantages: np.ndarray


def split_updates(num_samples: int, num_updates: int) -> list[np.ndarray]:
    """Sample indices of each optimiser update: interleaved, so that every update sees every group."""
    return [np.arange(start, num_samples, num_updates) for start in range(min(num_updates, num_samples))]


def micro_batches(samples: list[TrainSample], max_tokens: int) -> list[MicroBatch]:
    """Cuts samples into batches of at most `max_tokens` padded tokens (a longer single sample goes alone).

    Sorted by length, so that padding is small; deterministic.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt) + len(samples[i].response))
    batches: list[list[TrainSample]] = []
    for i in order:
        length = len(samples[i].prompt) + len(samples[i].response)
        if not batches or (len(batches[-1]) + 1) * length > max_tokens:
            batches.append([])
        batches[-1].append(samples[i])
    return [_pad(batch) for batch in batches]


def _pad(samples: list[TrainSample]) -> MicroBatch:
    rows, width = len(samples), max(len(s.prompt) + len(s.response) for s in samples)
    shape = (rows, width)
    batch = MicroBatch(
        input_ids=np.zeros(shape, np.int64),
        attention=np.zeros(shape, bool),
        targets=np.zeros(shape, np.int64),
        mask=np.zeros(shape, bool),
        old_logp=np.zeros(shape, np.float32),
        advantages=np.zeros((rows, 1), np.float32),
    )
    for row, sample in enumerate(samples):
        first, last = len(sample.prompt), len(sample.prompt) + len(sample.response)
        batch.input_ids[row, :first] = sample.prompt
        batch.input_ids[row, first:last] = sample.response
        batch.attention[row, :last] = True
        batch.targets[row, first - 1 : last - 1] = sample.response
        batch.mask[row, first - 1 : last - 1] = True
        batch.old_logp[row, first - 1 : last - 1] = sample.logprobs
        batch.advantages[row] = sample.advantage
    return batch

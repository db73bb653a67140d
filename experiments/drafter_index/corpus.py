"""Rollouts made by a rule: samples of one prompt share its phrases, prompts share idioms, and every token may be noise.

Invariants: a pure function of its arguments; token ids lie in [0, vocab); every rollout has the same length.

A rollout is a Markov walk over NUM_FRAGMENTS phrases of its prompt (each followed by one of a few, unevenly), broken
now and then by an idiom out of a pool that all prompts share, drawn by Zipf's law; each token is then replaced by a
uniform one with probability NOISE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slipstream.drafter.base import HistoryRecord

VOCAB = 32_000
NUM_FRAGMENTS = 120
NUM_IDIOMS = 3_000
NUM_SUCCESSORS = 4
IDIOM_SHARE = 0.3
NOISE = 0.03
MIN_PHRASE, MAX_PHRASE = 4, 24
SAMPLES_PER_VISIT = 4


@dataclass(frozen=True, slots=True)
class Corpus:
    """rollouts: [prompts, samples, length] int32, to learn from; held_out: [prompts, live, length] int32, to decode."""

    rollouts: np.ndarray
    held_out: np.ndarray

    def visits(self) -> Iterator[tuple[int, list[HistoryRecord]]]:
        """The rollouts as training steps of SAMPLES_PER_VISIT samples a prompt: (step, its records); negative uids."""
        num_samples = self.rollouts.shape[1]
        for first in range(0, num_samples, SAMPLES_PER_VISIT):
            step = first // SAMPLES_PER_VISIT
            samples = range(first, min(first + SAMPLES_PER_VISIT, num_samples))
            yield (
                step,
                [
                    HistoryRecord(str(prompt), step, -1 - prompt * num_samples - sample, self.rollouts[prompt, sample])
                    for prompt in range(len(self.rollouts))
                    for sample in samples
                ],
            )

    def texts(self, num_live: int) -> list[HistoryRecord]:
        """The first num_live held-out rollouts of every prompt, as one more step; uids count from 0."""
        step = -(-self.rollouts.shape[1] // SAMPLES_PER_VISIT)
        return [
            HistoryRecord(str(prompt), step, prompt * num_live + sample, tokens)
            for prompt, samples in enumerate(self.held_out)
            for sample, tokens in enumerate(samples[:num_live])
        ]


def make_corpus(num_prompts: int, num_samples: int, num_held_out: int, length: int, seed: int = 0) -> Corpus:
    """Draws `num_samples + num_held_out` rollouts of every prompt."""
    rng = np.random.default_rng(seed)
    idioms = _phrases(rng, NUM_IDIOMS)
    tokens = np.empty((num_prompts, num_samples + num_held_out, length), np.int32)
    for prompt in range(num_prompts):
        fragments = _phrases(rng, NUM_FRAGMENTS)
        successors = rng.integers(NUM_FRAGMENTS, size=(NUM_FRAGMENTS, NUM_SUCCESSORS))
        for sample in range(tokens.shape[1]):
            tokens[prompt, sample] = _walk(rng, fragments, successors, idioms, length)
    noisy = rng.random(tokens.shape) < NOISE
    tokens[noisy] = rng.integers(VOCAB, size=int(noisy.sum()))
    return Corpus(tokens[:, :num_samples], tokens[:, num_samples:])


def _phrases(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    # The square of a uniform number favours small ids, as tokenizers do.
    sizes = rng.integers(MIN_PHRASE, MAX_PHRASE + 1, size=count)
    return [(rng.random(size) ** 2 * VOCAB).astype(np.int32) for size in sizes]


def _walk(
    rng: np.random.Generator, fragments: list[np.ndarray], successors: np.ndarray, idioms: list[np.ndarray], length: int
) -> np.ndarray:
    steps = length // MIN_PHRASE + 1
    # Successor j is taken with probability about 2^-(j+1).
    choice = np.minimum(rng.geometric(0.5, size=steps) - 1, NUM_SUCCESSORS - 1)
    is_idiom = rng.random(steps) < IDIOM_SHARE
    idiom = (rng.zipf(1.3, size=steps) - 1) % NUM_IDIOMS
    at = int(rng.integers(NUM_FRAGMENTS))
    parts, total = [], 0
    for step in range(steps):
        if is_idiom[step]:
            part = idioms[int(idiom[step])]
        else:
            part = fragments[at]
            at = int(successors[at, choice[step]])
        parts.append(part)
        total += len(part)
        if total >= length:
            break
    return np.concatenate(parts)[:length]

"""How fast: the native index and its peer on the synthetic corpus, in CPU seconds of the calling thread.

Invariant: both sides of a comparison get the same tokens, the same live requests and the same number of rounds in the
same process; every rate is a median over rounds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.drafter_index.arctic import DEPTHS, ArcticDrafter, Peer, insert_rate
from slipstream.experiments.drafter_index.corpus import Corpus
from slipstream.experiments.drafter_index.decode import decode
from slipstream.kernels import _native  # type: ignore[attr-defined]

MANY, MOST = 256, 1024
"""Live requests of a timed step."""
EXTEND_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Timing:
    """draft: most draft tokens of a request; steps: engine steps of a round; rounds: runs behind every median."""

    draft: int
    steps: int
    rounds: int


def index_rates(corpus: Corpus, timing: Timing) -> dict[str, Any]:
    """All rates of the native index."""
    return {
        **build_rates(corpus, timing.rounds),
        **live_rates(corpus, timing.rounds),
        "step_us_256": step_time(corpus, MANY, timing),
        "step_us_1024": step_time(corpus, MOST, timing),
        "step_wall_us": {
            f"{rows}_rows_{threads}_threads": step_wall_time(corpus, rows, threads, timing)
            for rows in (MANY, 2 * MANY, MOST)
            for threads in (1, 2)
        },
    }


def build_rates(corpus: Corpus, rounds: int) -> dict[str, float]:
    """Tokens per CPU second of inserting a prompt's window and of freezing it."""
    num_prompts, num_samples, length = corpus.rollouts.shape
    offsets = np.arange(num_samples + 1, dtype=np.int64) * length
    weights = np.ones(num_samples, np.float32)
    seconds = [
        np.sum([_native.suffix_build_seconds(rows.ravel(), offsets, weights) for rows in corpus.rollouts], axis=0)
        for _ in range(rounds)
    ]
    insert_s, freeze_s = np.median(seconds, axis=0)
    total = num_prompts * num_samples * length
    return {"insert_tokens_per_s": total / insert_s, "freeze_tokens_per_s": total / freeze_s}


def live_rates(corpus: Corpus, rounds: int) -> dict[str, float]:
    """Tokens per CPU second of extending live requests, and bytes per token of both tiers."""
    num_prompts, num_samples, length = corpus.rollouts.shape
    each = corpus.held_out.shape[1]
    rows = num_prompts * each
    uids = np.arange(rows, dtype=np.int64)
    offsets = np.arange(rows + 1, dtype=np.int64) * EXTEND_CHUNK
    rates = []
    for _ in range(rounds):
        index = _native.SuffixIndexSet()
        for prompt, samples in enumerate(corpus.rollouts):
            ends = np.arange(num_samples + 1, dtype=np.int64) * length
            index.publish(
                str(prompt), samples.ravel(), ends, np.ones(num_samples, np.float32), np.ones(num_samples, np.uint8)
            )
        index.publish_shared(corpus.rollouts.ravel(), np.arange(num_prompts * num_samples + 1, dtype=np.int64) * length)
        for uid in range(rows):
            index.begin(uid, str(uid // each), np.zeros(0, np.int32))
        texts = corpus.held_out.reshape(rows, length)
        started = time.thread_time()
        for first in range(0, length - EXTEND_CHUNK + 1, EXTEND_CHUNK):
            index.extend(uids, texts[:, first : first + EXTEND_CHUNK].ravel(), offsets)
        rates.append(rows * (length // EXTEND_CHUNK * EXTEND_CHUNK) / (time.thread_time() - started))
        index.wait()
        stats = index.stats()
        index.close()
    tokens = stats["frozen_tokens"] + stats["live_tokens"]
    size = stats["frozen_bytes"] + stats["live_bytes"] + stats["shared_bytes"]
    return {
        "extend_tokens_per_s": float(np.median(rates)),
        "bytes_per_token": size / tokens,
        "bytes_per_token_frozen": stats["frozen_bytes"] / stats["frozen_tokens"],
        "bytes_per_token_live": stats["live_bytes"] / stats["live_tokens"],
        "bytes_per_token_shared": stats["shared_bytes"] / stats["shared_tokens"],
    }


def step_time(corpus: Corpus, num_live: int, timing: Timing) -> float:
    """CPU microseconds of the drafter's propose + extend for num_live requests, spread evenly over the prompts."""
    texts = corpus.texts(max(1, num_live // len(corpus.rollouts)))
    medians = []
    for _ in range(timing.rounds):
        drafter = SuffixDrafter(index="native")
        for step, records in corpus.visits():
            drafter.publish(step, records)
        drafter.wait()
        medians.append(np.median(decode(drafter, texts, timing.draft, max_steps=timing.steps).step_us))
    return float(np.median(medians))


def step_wall_time(corpus: Corpus, num_live: int, num_threads: int, timing: Timing) -> float:
    """Wall microseconds of propose + extend in the index alone, its threads used whatever the batch."""
    texts = corpus.texts(max(1, num_live // len(corpus.rollouts)))
    drafter = SuffixDrafter(index="native", num_threads=num_threads, threads_from=0)
    for step, records in corpus.visits():
        drafter.publish(step, records)
    drafter.wait()
    return float(np.median(decode(drafter, texts, timing.draft, max_steps=timing.steps).wall_us))


def arctic_rates(peer: Peer, corpus: Corpus, timing: Timing) -> dict[str, dict[str, float]]:
    """Of the peer, by tree depth: tokens per CPU second inserted, and CPU microseconds of a step for MANY requests."""
    texts = corpus.texts(max(1, MANY // len(corpus.rollouts)))
    # All of them first: a heap that has held a large tree makes the next one slower.
    inserted = {depth: [insert_rate(peer, corpus.rollouts, depth) for _ in range(timing.rounds)] for depth in DEPTHS}
    rates = {}
    for depth in DEPTHS:
        drafter = ArcticDrafter(peer, depth)
        for step, records in corpus.visits():
            drafter.publish(step, records)
        medians = []
        for _ in range(timing.rounds):
            drafter.step_us.clear()
            decode(drafter, texts, timing.draft, max_steps=timing.steps)
            medians.append(np.median(drafter.step_us))
            drafter.forget_ended()
        rates[f"depth_{depth}"] = {
            "insert_tokens_per_s": float(np.median(inserted[depth])),
            "step_us_256": float(np.median(medians)),
        }
    return rates

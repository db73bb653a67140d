"""How fast is the drafter's index, and how many tokens a round does it guess, next to simpler drafters?

One process and one core: every time is CPU time of the calling thread, a median over `--rounds`. The corpus is made by
corpus.py. Its rollouts are the history (in visits of `SAMPLES_PER_VISIT`); held-out rollouts of the same prompts are
decoded teacher-forced, as an engine would: propose for the whole batch, accept the longest right prefix of each draft
and one token more, extend.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipstream.drafter.base import DraftBatch, Drafter, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.ngram import NgramDrafter
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.drafter_index.corpus import Corpus, make_corpus
from slipstream.kernels import _native  # type: ignore[attr-defined]

SAMPLES_PER_VISIT = 4
NUM_HELD_OUT = 16
MIN_ACCEPT_PROB = 0.1
ARCTIC = "not run: this bench compares with arctic-inference only where that package is built, and it is not here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--prompts", type=int, default=64, help="prompts (default 64)")
    parser.add_argument("--samples", type=int, default=16, help="past rollouts of each prompt (default 16)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a rollout (default 2048)")
    parser.add_argument("--draft", type=int, default=16, help="most draft tokens of a request (default 16)")
    parser.add_argument("--steps", type=int, default=60, help="engine steps of one timed round (default 60)")
    parser.add_argument("--rounds", type=int, default=5, help="runs behind every median (default 5)")
    parser.add_argument("--baseline-prompts", type=int, default=8, help="prompts in accepted_per_round (default 8)")


@dataclass(slots=True)
class Decoded:
    """Totals of a teacher-forced decode. step_us: CPU microseconds of each propose + extend."""

    rounds: int
    drafted: int
    accepted: int
    step_us: list[float]


def decode(drafter: Drafter, texts: np.ndarray, prompt_ids: list[str], width: int, max_steps: int) -> Decoded:
    """Decodes texts [rows, length], row i as a response to prompt_ids[i], until one ends or max_steps are done."""
    rows, length = texts.shape
    uids, every = np.arange(rows, dtype=np.int64), np.arange(rows)[:, None]
    for uid, prompt_id in enumerate(prompt_ids):
        drafter.begin(uid, prompt_id, np.zeros(0, np.int32))
    padded = np.concatenate([texts, np.full((rows, width + 1), -1, np.int32)], axis=1)
    out = DraftBatch.empty(rows, width)
    price = Price(np.full(rows, width, np.int32), np.full(rows, MIN_ACCEPT_PROB, np.float32))
    at = np.zeros(rows, np.int32)
    done = Decoded(0, 0, 0, [])
    while len(done.step_us) < max_steps and at.max() + width + 1 <= length:
        live = LiveBatch(uids, at, length - at, at)
        started = time.thread_time()
        out.clear(rows)
        drafter.propose(live, price, out)
        seconds = time.thread_time() - started
        right = padded[every, at[:, None] + np.arange(width + 1)]
        agrees = (out.tokens == right[:, :width]) & (np.arange(width) < out.count[:, None])
        accepted = np.cumprod(agrees, axis=1).sum(axis=1)
        values = right[np.arange(width + 1) <= accepted[:, None]]
        offsets = np.concatenate([[0], np.cumsum(accepted + 1)])
        started = time.thread_time()
        drafter.extend(live, Ragged(values, offsets))
        done.step_us.append(1e6 * (seconds + time.thread_time() - started))
        done.rounds += rows
        done.drafted += int(out.count.sum())
        done.accepted += int(accepted.sum())
        at = at + accepted.astype(np.int32) + 1
    for uid in range(rows):
        drafter.end(uid, finished=True)
    return done


def records(corpus: Corpus, name: Callable[[int], str]) -> Iterator[tuple[int, list[HistoryRecord]]]:
    """The corpus as training steps: (step, its records)."""
    for first in range(0, corpus.rollouts.shape[1], SAMPLES_PER_VISIT):
        step = first // SAMPLES_PER_VISIT
        yield (
            step,
            [
                HistoryRecord(name(prompt), step, -1, tokens)
                for prompt, samples in enumerate(corpus.rollouts)
                for tokens in samples[first : first + SAMPLES_PER_VISIT]
            ],
        )


def warm(drafter: Drafter, corpus: Corpus, name: Callable[[int], str] = str) -> Drafter:
    """The drafter after all training steps of the corpus."""
    for step, of_step in records(corpus, name):
        drafter.publish(step, of_step)
    return drafter


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
    rows = num_prompts * NUM_HELD_OUT
    uids = np.arange(rows, dtype=np.int64)
    chunk = 64
    offsets = np.arange(rows + 1, dtype=np.int64) * chunk
    rates = []
    for _ in range(rounds):
        index = _native.SuffixIndexSet()
        for prompt, samples in enumerate(corpus.rollouts):
            ends = np.arange(num_samples + 1, dtype=np.int64) * length
            index.publish(str(prompt), samples.ravel(), ends, np.ones(num_samples, np.float32))
        for uid in range(rows):
            index.begin(uid, str(uid // NUM_HELD_OUT))
        texts = corpus.held_out.reshape(rows, length)
        started = time.thread_time()
        for first in range(0, length - chunk + 1, chunk):
            index.extend(uids, texts[:, first : first + chunk].ravel(), offsets)
        rates.append(rows * (length // chunk * chunk) / (time.thread_time() - started))
        stats = index.stats()
        index.close()
    tokens, size = stats["frozen_tokens"] + stats["live_tokens"], stats["frozen_bytes"] + stats["live_bytes"]
    return {
        "extend_tokens_per_s": float(np.median(rates)),
        "bytes_per_token": size / tokens,
        "bytes_per_token_frozen": stats["frozen_bytes"] / stats["frozen_tokens"],
        "bytes_per_token_live": stats["live_bytes"] / stats["live_tokens"],
    }


def step_time(corpus: Corpus, num_live: int, args: argparse.Namespace) -> float:
    """Median CPU microseconds of propose + extend for num_live requests, spread evenly over the prompts."""
    each = max(1, num_live // args.prompts)
    texts = corpus.held_out[:, :each].reshape(-1, corpus.held_out.shape[2])
    names = [str(row // each) for row in range(len(texts))]
    medians = []
    for _ in range(args.rounds):
        drafter = warm(SuffixDrafter(index="native"), corpus)
        medians.append(float(np.median(decode(drafter, texts, names, args.draft, args.steps).step_us)))
    return float(np.median(medians))


def acceptance(corpus: Corpus, num_prompts: int, width: int) -> dict[str, dict[str, float]]:
    """Accepted and drafted tokens per round of every drafter on the first num_prompts prompts, four live each."""
    part = Corpus(corpus.rollouts[:num_prompts], corpus.held_out[:num_prompts, :4])
    texts = part.held_out.reshape(-1, part.held_out.shape[2])
    names = [str(row // 4) for row in range(len(texts))]
    arms: dict[str, tuple[Drafter, bool]] = {
        "suffix": (SuffixDrafter(index="native"), False),
        "suffix_reference": (SuffixDrafter(index="reference"), False),
        "ngram": (NgramDrafter(), False),
        "last_epoch_only": (SuffixDrafter(window_epochs=1, index="native"), False),
        "global_scope": (SuffixDrafter(index="native"), True),
    }
    out: dict[str, dict[str, float]] = {"accepted_per_round": {}, "drafted_per_round": {}}
    for arm, (drafter, is_global) in arms.items():
        warm(drafter, part, (lambda _: "all") if is_global else str)
        done = decode(drafter, texts, ["all"] * len(names) if is_global else names, width, 10**6)
        out["accepted_per_round"][arm] = done.accepted / done.rounds
        out["drafted_per_round"][arm] = done.drafted / done.rounds
    return out


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All parts, one after the other."""
    corpus = make_corpus(args.prompts, args.samples, NUM_HELD_OUT, args.length)
    return {
        **build_rates(corpus, args.rounds),
        **live_rates(corpus, args.rounds),
        "step_us_256": step_time(corpus, 256, args),
        "step_us_1024": step_time(corpus, 1024, args),
        **acceptance(corpus, args.baseline_prompts, args.draft),
        "vs_arctic_insert": None,
        "vs_arctic_step": None,
        "vs_arctic_reason": ARCTIC,
        "corpus_tokens": int(corpus.rollouts.size),
        "rounds": args.rounds,
        "draft": args.draft,
    }

"""How fast is the drafter's index, and how many tokens a round does it guess, next to simpler drafters and its peer?

One process and one core: every time is CPU time of the calling thread, a median over `--rounds`. Tokens guessed are
counted on two corpora: one made by a rule (corpus.py), where held-out rollouts are decoded after the others, and the
rollouts of a quickstart job (recorded.py), where each step is decoded after the steps before it, as in the job.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from slipstream.experiments.drafter_index.acceptance import from_corpus, from_recording, measure
from slipstream.experiments.drafter_index.arctic import find_arctic
from slipstream.experiments.drafter_index.build_arctic import DEFAULT_OUT
from slipstream.experiments.drafter_index.corpus import make_corpus
from slipstream.experiments.drafter_index.rates import Timing, arctic_rates, index_rates
from slipstream.experiments.drafter_index.recorded import QUICKSTART, load_recording

NUM_HELD_OUT = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--prompts", type=int, default=64, help="prompts (default 64)")
    parser.add_argument("--samples", type=int, default=16, help="past rollouts of each prompt (default 16)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a rollout (default 2048)")
    parser.add_argument("--draft", type=int, default=16, help="most draft tokens of a request (default 16)")
    parser.add_argument("--steps", type=int, default=60, help="engine steps of one timed round (default 60)")
    parser.add_argument("--rounds", type=int, default=5, help="runs behind every median (default 5)")
    parser.add_argument(
        "--baseline-prompts", type=int, default=64, help="synthetic prompts in accepted_per_round (default 64)"
    )
    parser.add_argument(
        "--recorded", type=Path, default=QUICKSTART, help="recorded rollouts (default the shipped ones)"
    )
    parser.add_argument(
        "--arctic", type=Path, default=DEFAULT_OUT, help=f"folder with arctic-inference (default {DEFAULT_OUT})"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All parts, one after the other."""
    recording = load_recording(args.recorded)
    peer, reason = find_arctic(args.arctic)
    corpus = make_corpus(args.prompts, args.samples, NUM_HELD_OUT, args.length)
    timing = Timing(args.draft, args.steps, args.rounds)
    rates = index_rates(corpus, timing)
    peer_rates = arctic_rates(peer, corpus, timing) if peer else {}
    synthetic = measure(from_corpus(corpus, args.baseline_prompts), args.draft, peer)
    recorded = measure(from_recording(recording, "quickstart"), args.draft, peer)
    return {
        **rates,
        **{key: synthetic[key] | recorded[key] for key in synthetic},
        "arctic": peer_rates,
        **compare(rates, peer_rates),
        "vs_arctic_reason": reason,
        "corpus_tokens": int(corpus.rollouts.size),
        "recorded_tokens": sum(len(record.tokens) for record in recording.records),
        "rounds": args.rounds,
        "draft": args.draft,
    }


def compare(rates: dict[str, float], peer_rates: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """How many times faster than the peer at the depth that is best for it; None without the peer."""
    if not peer_rates:
        return dict.fromkeys(("vs_arctic_insert", "vs_arctic_insert_and_freeze", "vs_arctic_step"))
    insert = max(one["insert_tokens_per_s"] for one in peer_rates.values())
    step_us = min(one["step_us_256"] for one in peer_rates.values())
    built = 1 / (1 / rates["insert_tokens_per_s"] + 1 / rates["freeze_tokens_per_s"])
    return {
        "vs_arctic_insert": rates["insert_tokens_per_s"] / insert,
        "vs_arctic_insert_and_freeze": built / insert,
        "vs_arctic_step": step_us / rates["step_us_256"],
    }

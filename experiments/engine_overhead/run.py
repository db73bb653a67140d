"""How much of a step does the embedded engine spend outside the model, and how does it compare with generate()?

One process, the quickstart policy, `--live` requests without drafting, every response exactly `--tokens` long for both
arms (no stop token, no early finish, which would favour the engine's continuous batching). Arms are interleaved;
medians over `--rounds`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from slipstream.experiments.rollout_speed.peers import batched_generate
from slipstream.experiments.workload import Workload, quickstart_workload
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--live", type=int, default=32, help="requests decoded together (default 32)")
    parser.add_argument("--tokens", type=int, default=128, help="response tokens of every request (default 128)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, as one rollout worker (default 1)")


def run_engine(engine: TorchEngine, requests: list[Request]) -> tuple[float, EngineStats]:
    """Wall seconds and totals of one batch."""
    engine.stats(reset=True)
    started = time.perf_counter()
    engine.submit(requests)
    engine.drain(timeout_s=600)
    return time.perf_counter() - started, engine.stats()


def run_generate(model: PreTrainedModel, workload: Workload, requests: list[Request], num_tokens: int) -> float:
    """Wall seconds of transformers' generate on the same prompts, left-padded, as many tokens each."""
    return batched_generate(model, requests, [num_tokens] * len(requests), workload.tokenizer.pad_token_id or 0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Interleaves the arms and reports medians."""
    torch.set_num_threads(args.threads)
    workload = quickstart_workload()
    requests = workload.requests(workload.prompts.train[: args.live], 1, args.tokens, stop=False)
    engine = TorchEngine(workload.model(), max_live_requests=args.live, max_len=1024)
    generate_model = workload.model()
    run_engine(engine, requests[:4])
    run_generate(generate_model, workload, requests[:4], 8)
    total_tokens = args.live * args.tokens
    shares, rates, generate_rates, parts = [], [], [], []
    for _ in range(args.rounds):
        seconds, stats = run_engine(engine, requests)
        rates.append(total_tokens / seconds)
        shares.append(1.0 - stats.forward_s / seconds)
        parts.append([stats.forward_s, stats.sample_s, stats.other_s])
        generate_rates.append(total_tokens / run_generate(generate_model, workload, requests, args.tokens))
    step_ms = 1e3 * np.median(parts, axis=0) / args.tokens
    return {
        "overhead_share": float(np.median(shares)),
        "tokens_per_s": float(np.median(rates)),
        "hf_generate_tokens_per_s": float(np.median(generate_rates)),
        "speedup_vs_hf_generate": float(np.median(np.array(rates) / np.array(generate_rates))),
        "step_ms_forward": float(step_ms[0]),
        "step_ms_sampling": float(step_ms[1]),
        "step_ms_other": float(step_ms[2]),
        "live_requests": args.live,
        "tokens_per_request": args.tokens,
        "rounds": args.rounds,
        "threads": args.threads,
    }

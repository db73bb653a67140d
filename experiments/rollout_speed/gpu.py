"""The GPU arm of rollout_speed: decoding against the memory bandwidth, a warm tail, batch invariance, memory.

Invariants: a model with random weights, made in place; every arm produces the same lengths; the history of the warm
arm is earlier visits of the same prompts under other noise, and how much of it was accepted is printed; tokens with
drafts are compared with those without.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.kernels.timing import ceiling
from slipstream.experiments.rollout_speed.memory import cuda_memory
from slipstream.experiments.rollout_speed.peers import batched_generate
from slipstream.experiments.rollout_speed.presets import PRESETS, bytes_read, make_model
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.budget import PriceBudget
from slipstream.rollout.cost_model import CostModel
from slipstream.rollout.graphs import StaticRunner
from slipstream.rollout.pricing import Pricing
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid

STEP = 1000
"""Requests of the timed step; earlier visits are steps 1, 2, ..., so their noise is another one."""

SETTLE = 6
"""Passes before a decode step is timed: prompts, the first pass of a bucket, and its capture."""


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the GPU arm."""
    group = parser.add_argument_group("on a GPU (--device cuda)")
    group.add_argument("--preset", choices=sorted(PRESETS), default="qwen3_0.6b", help="shape of the model")
    group.add_argument("--tail", type=int, default=8, help="live requests of the tail (default 8)")
    group.add_argument("--prompt-tokens", type=int, default=256, help="tokens of a prompt in the tail (default 256)")
    group.add_argument("--context", type=int, default=2048, help="context when decoding is timed (default 2048)")
    group.add_argument("--decode-steps", type=int, default=128, help="decode steps timed (default 128)")
    group.add_argument("--temperature", type=float, default=0.05, help="of the tail: random weights give flat logits")
    group.add_argument("--compile", action="store_true", help="engine.compile=true in every arm")
    group.add_argument(
        "--gpu-knee",
        type=float,
        default=256.0,
        help="tokens that cost as much as a pass until measured (default 256)",
    )


@dataclass(slots=True)
class Bench:
    """Model, device and options of one run."""

    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype

    def model(self) -> PreTrainedModel:
        """A fresh copy."""
        return make_model(self.args.preset, self.dtype, self.device)

    def requests(self, num: int, prompt_tokens: int, new_tokens: int, step: int, samples: int = 1) -> list[Request]:
        """`samples` requests for each of `num` random prompts; they never stop by themselves."""
        sampling = Sampling(new_tokens, temperature=self.args.temperature, seed=0)
        vocab = PRESETS[self.args.preset][1]["vocab_size"]
        prompts = np.random.default_rng(0).integers(3, vocab, (num, prompt_tokens), dtype=np.int32)
        return [
            Request(request_uid(0, step, i, sample), f"p{i}", i, prompt, sampling)
            for i, prompt in enumerate(prompts)
            for sample in range(samples)
        ]


def run_gpu(args: argparse.Namespace, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """All figures of the GPU arm; on another device only their arithmetic is of use."""
    bench = Bench(args, device, dtype)
    model = bench.model()
    copied = ceiling(device, args.rounds)
    result: dict[str, Any] = {
        "preset": args.preset,
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "dtype": str(dtype)[6:],
        "copy_gb_per_s": copied / 1e9,
        "decode": {f"batch_{batch}": decode_floor(bench, model, batch, copied) for batch in (1, 8)},
    }
    result |= tail(bench, model)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        result |= cuda_memory(bench.model, device, 1024, (8, 64))
    return result | {"rounds": args.rounds}


def decode_floor(bench: Bench, model: PreTrainedModel, batch: int, bytes_per_s: float) -> dict[str, float]:
    """A decode step of `batch` requests against the time that its weights and its keys and values take to read."""
    args, prompt_tokens = bench.args, max(bench.args.context - bench.args.decode_steps // 2 - SETTLE, 1)
    new_tokens = args.decode_steps + 2 * SETTLE
    engine = TorchEngine(
        model,
        max_live_requests=batch,
        max_len=prompt_tokens + new_tokens,
        max_forward_tokens=max(2048, batch),
        compile=args.compile,
    )
    engine.submit(bench.requests(batch, prompt_tokens, new_tokens, STEP))
    while not engine.table.order.size or (engine.table.length - engine.table.prompt_len)[engine.table.order].min() < 1:
        engine.step()
    for _ in range(SETTLE):
        engine.step()
    kv_bytes = engine.cache.num_bytes() / (engine.cache.num_slots * engine.max_len)
    first = int(engine.table.length[engine.table.order].sum())
    started = time.perf_counter()
    for _ in range(args.decode_steps):
        engine.step()
    step_s = (time.perf_counter() - started) / args.decode_steps
    context = first + batch * args.decode_steps / 2
    size = bytes_read(model) + context * kv_bytes
    engine.abort(list(engine.table.slot_of))
    return {
        "step_ms": 1e3 * step_s,
        "bytes": float(size),
        "floor_ms": 1e3 * size / bytes_per_s,
        "floor_share": size / bytes_per_s / step_s,
        "context_tokens": context / batch,
    }


def tail(bench: Bench, model: PreTrainedModel) -> dict[str, Any]:
    """The last live requests of a step, without drafts and warm, with and without batch invariance, and generate()."""
    args = bench.args
    requests = bench.requests(args.tail, args.prompt_tokens, args.max_new_tokens, STEP)
    history = visits(bench, model)
    engines = {"": make_engine(bench, model), "_invariant": make_engine(bench, bench.model(), batch_invariant=True)}
    plain = bench.model()
    rates: dict[str, list[float]] = {}
    tokens: dict[str, list[Rollout]] = {}
    different = dict.fromkeys(engines, 0)
    compared = dict.fromkeys(engines, 0)
    warm_stats: Any = None
    for turn in range(args.rounds + 1):
        for kind, engine in engines.items():
            for name, past in (("off", None), ("warm", history)):
                set_drafter(engine, past)
                rate, rollouts = timed(engine, requests)
                if turn:  # the first turn captures the graphs
                    rates.setdefault(f"{name}{kind}", []).append(rate)
                if past is None:
                    tokens[kind] = rollouts
                    continue
                compared[kind] += sum(len(rollout.tokens) for rollout in rollouts)
                different[kind] += count_different(rollouts, tokens[kind])
                warm_stats = engine.stats() if not kind else warm_stats
        if turn:
            lengths = [len(rollout.tokens) for rollout in tokens[""]]
            rates.setdefault("hf_generate", []).append(sum(lengths) / batched_generate(plain, requests, lengths, 0))
    return report(rates, compared, different, warm_stats, engines[""]) | {"compile": args.compile}


def make_engine(bench: Bench, model: PreTrainedModel, live: int = 0, **options: Any) -> TorchEngine:
    """An engine for the tail's requests, or for `live` at a time."""
    longest = bench.args.prompt_tokens + bench.args.max_new_tokens
    live = live or bench.args.tail
    options |= {"compile": bench.args.compile, "max_forward_tokens": max(2048, live)}
    pricing = Pricing(live, CostModel(bench.args.gpu_knee))
    return TorchEngine(model, max_live_requests=live, max_len=longest, pricing=pricing, **options)


def visits(bench: Bench, model: PreTrainedModel) -> list[HistoryRecord]:
    """Earlier visits of the same prompts by the same policy, under other noise."""
    args, history = bench.args, []
    engine = make_engine(bench, model, live=args.tail * args.samples)
    for step in range(1, args.visits + 1):
        engine.submit(bench.requests(args.tail, args.prompt_tokens, args.max_new_tokens, step, args.samples))
        history += [
            HistoryRecord(rollout.request.prompt_id, step, rollout.request.uid, rollout.tokens)
            for rollout in engine.drain(timeout_s=3600)
        ]
    return history


def set_drafter(engine: TorchEngine, history: Sequence[HistoryRecord] | None) -> None:
    """A drafter that has seen `history` and nothing else; None: no drafter."""
    engine.drafter = engine.budget = None
    if history is None:
        return
    drafter = SuffixDrafter()
    for step in sorted({record.step for record in history}):
        drafter.publish(step, [record for record in history if record.step == step])
    drafter.wait()
    engine.drafter, engine.budget = drafter, PriceBudget(32)
    engine.learn_acceptance(AcceptanceModel())


def timed(engine: TorchEngine, requests: list[Request]) -> tuple[float, list[Rollout]]:
    """Tokens per second of wall time, and the rollouts in the order of the requests."""
    engine.stats(reset=True)
    started = time.perf_counter()
    engine.submit(requests)
    by_uid = {rollout.request.uid: rollout for rollout in engine.drain(timeout_s=3600)}
    seconds = time.perf_counter() - started
    return engine.stats().generated_tokens / seconds, [by_uid[request.uid] for request in requests]


def count_different(mine: Sequence[Rollout], theirs: Sequence[Rollout]) -> int:
    """Tokens that differ, place by place, the longer one's surplus included."""
    total = 0
    for a, b in zip(mine, theirs, strict=True):
        common = min(len(a.tokens), len(b.tokens))
        total += int((a.tokens[:common] != b.tokens[:common]).sum()) + abs(len(a.tokens) - len(b.tokens))
    return total


def report(
    rates: dict[str, list[float]], compared: dict[str, int], different: dict[str, int], warm: Any, engine: TorchEngine
) -> dict[str, Any]:
    """The figures of the tail, by key."""
    by_round = {name: np.array(values) for name, values in rates.items()}
    runner = engine.runner
    graphs = runner.stats if isinstance(runner, StaticRunner) else None
    return {
        "tokens_per_s": {name: float(np.median(values)) for name, values in by_round.items()},
        "speedup_warm_vs_off": float(np.median(by_round["warm"] / by_round["off"])),
        "speedup_off_vs": {"hf_generate": float(np.median(by_round["off"] / by_round["hf_generate"]))},
        "speedup_warm_vs": {"hf_generate": float(np.median(by_round["warm"] / by_round["hf_generate"]))},
        "batch_invariant_cost": float(np.median(by_round["off"] / by_round["off_invariant"])),
        "tokens_compared": compared[""],
        "tokens_different": different[""],
        "tokens_compared_invariant": compared["_invariant"],
        "tokens_different_invariant": different["_invariant"],
        "accepted_per_round": warm.accepted / max(1, warm.rounds),
        "accepted_share_of_drafted": warm.accepted / max(1, warm.drafted),
        "graphs": None
        if graphs is None
        else {
            "captured": graphs.captured,
            "replayed": graphs.replayed,
            "eager": graphs.eager,
            "refused": len(graphs.refused),
        },
        "steps": engine.runner_reason,
    }

"""How many tokens per second do rollouts reach, without and with drafts, next to transformers' own generation?

One process, one policy, one set of requests. The engine without drafts samples first and so sets every response's
length; each arm then produces exactly those lengths. The engine's tokens with drafts, cold (nothing but siblings to
draft from) and warm (earlier visits of the same prompts in the history, and what they showed of acceptance), are
compared with those without. Arms are interleaved; every figure is a median over `--rounds`.
"""

from __future__ import annotations

import argparse
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.rollout_speed.gpu import add_gpu_arguments, run_gpu
from slipstream.experiments.rollout_speed.memory import cpu_memory
from slipstream.experiments.rollout_speed.peers import (
    NUM_LOOKUP_TOKENS,
    batched_generate,
    first_layers,
    one_by_one,
    trl_generate,
)
from slipstream.experiments.workload import Workload, open_prompts, quickstart_workload
from slipstream.kernels.dispatch import ProductChoice
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.budget import PriceBudget
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.learned import observe_records
from slipstream.rollout.lengths import LengthModel
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout
from slipstream.trainer.errors import ConfigError

STEP = 1000
"""Requests of the timed step; earlier visits are steps 1, 2, ..., so their noise is another one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--prompts", type=int, default=8, help="prompts (default 8)")
    parser.add_argument("--samples", type=int, default=8, help="samples of each prompt (default 8)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest response (default 512)")
    parser.add_argument("--visits", type=int, default=16, help="earlier visits (default 16, all that a window holds)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default 0: all cores)")
    parser.add_argument("--one-by-one", type=int, default=8, help="requests of the arms that take one at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: another set of arms, see below")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of a live token (two processes)")
    add_gpu_arguments(parser)


@dataclass(slots=True)
class Arms:
    """What is timed. rates: tokens per second of each round, and stats: the engine's totals of the last one, by arm."""

    workload: Workload
    requests: list[Request]
    args: argparse.Namespace
    rates: dict[str, list[float]] = field(default_factory=dict)
    stats: dict[str, EngineStats] = field(default_factory=dict)

    def make_engine(self, products: ProductChoice = "auto") -> TorchEngine:
        """The engine of our arms: its memory has been touched before anything is timed."""
        longest = max(len(request.prompt) for request in self.requests) + self.args.max_new_tokens
        return TorchEngine(self.model(), max_live_requests=len(self.requests), max_len=longest, cpu_products=products)

    def set_drafter(
        self, engine: TorchEngine, history: Sequence[HistoryRecord] | None, acceptance: AcceptanceModel | None = None
    ) -> None:
        """Gives the engine a drafter and a length model that have seen `history` and nothing else; None: no drafter.
        acceptance: what those visits showed of it."""
        engine.drafter = engine.budget = None
        if history is None:
            return
        drafter = self.start_drafter(engine, AcceptanceModel() if acceptance is None else acceptance.copy())
        lengths = LengthModel()
        for step in sorted({record.step for record in history}):
            visit = [record for record in history if record.step == step]
            drafter.publish(step, visit)
            observe_records(lengths, visit)
        drafter.wait()
        engine.pricing.learn_lengths(lengths)

    def start_drafter(self, engine: TorchEngine, acceptance: AcceptanceModel) -> SuffixDrafter:
        """Gives the engine a drafter without history, and the product's default budget."""
        drafter = SuffixDrafter()
        open_prompts(drafter, self.requests)
        engine.drafter, engine.budget = drafter, PriceBudget(32)
        engine.learn_acceptance(acceptance)
        return drafter

    def model(self) -> PreTrainedModel:
        """A fresh copy of the policy."""
        return self.workload.model()

    def time_engine(self, name: str, engine: TorchEngine) -> list[Rollout]:
        """Runs the requests once and notes the rate; rollouts in the order of the requests."""
        engine.stats(reset=True)
        engine.submit(self.requests)
        by_uid = {rollout.request.uid: rollout for rollout in engine.drain(timeout_s=3600)}
        stats = engine.stats()
        self.stats[name] = stats
        self.rates.setdefault(name, []).append(stats.generated_tokens / stats.total_s)
        return [by_uid[request.uid] for request in self.requests]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Interleaves the arms and reports medians, ratios and what was compared."""
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no GPU; allowed here: --device cpu")
        return run_gpu(args, torch.device("cuda"))
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    workload = quickstart_workload()
    # Evenly over the difficulties, the hardest included: most responses are short and a few are long.
    ranked = sorted(workload.prompts.train, key=lambda prompt: prompt.level or 0)
    prompts = [ranked[i] for i in np.linspace(0, len(ranked) - 1, args.prompts).round().astype(int)]
    arms = Arms(workload, workload.requests(prompts, args.samples, args.max_new_tokens, step=STEP), args)
    engine = arms.make_engine()
    history, acceptance = sample_history(arms, engine, prompts)
    tokens = [rollout.tokens for rollout in arms.time_engine("warm_up", engine)]
    lengths = [len(row) for row in tokens]
    peers = make_peers(arms, lengths)
    # Where tiles are the default, the other way to multiply runs beside them; its tokens may differ where numbers tie.
    fma = arms.make_engine("fma") if engine.kernels.products == "tiles" else None
    if fma is not None:
        sample_history(arms, fma, prompts)  # its costs are measured as those of the other engine were
    compared = different = 0
    for _ in range(args.rounds):
        # A drafter learns from what it sees: every round begins with one that has not seen this step.
        for name, past in (("off", None), ("cold", []), ("warm", history)):
            arms.set_drafter(engine, past, acceptance if past else None)
            rollouts = arms.time_engine(name, engine)
            if fma is not None and name != "cold":
                arms.set_drafter(fma, past, acceptance if past else None)
                arms.time_engine(f"{name}_fma", fma)
            if past is None:
                continue
            for mine, theirs in zip(rollouts, tokens, strict=True):
                compared += max(len(mine.tokens), len(theirs))
                common = min(len(mine.tokens), len(theirs))
                different += int((mine.tokens[:common] != theirs[:common]).sum())
                different += abs(len(mine.tokens) - len(theirs))
        for name, (count, peer) in peers.items():
            arms.rates.setdefault(name, []).append(sum(lengths[:count]) / peer())
    memory = {} if args.no_memory else cpu_memory(workload.folder)
    return report(arms, lengths, compared, different) | {"cpu_products": engine.kernels.products} | memory


def sample_history(
    arms: Arms, engine: TorchEngine, prompts: Sequence[Any]
) -> tuple[list[HistoryRecord], AcceptanceModel]:
    """Earlier visits of the same prompts by the same policy, drafting as a job does, and what they showed of
    acceptance. The engine is left without a drafter."""
    args, history = arms.args, []
    drafter = arms.start_drafter(engine, AcceptanceModel())
    for step in range(1, args.visits + 1):
        engine.submit(arms.workload.requests(prompts, args.samples, args.max_new_tokens, step=step))
        visit = [
            HistoryRecord(rollout.request.prompt_id, step, rollout.request.uid, rollout.tokens)
            for rollout in engine.drain(timeout_s=3600)
        ]
        drafter.publish(step, visit)
        drafter.wait()
        history += visit
    acceptance = engine.acceptance.copy()
    arms.set_drafter(engine, None)
    return history, acceptance


def make_peers(arms: Arms, lengths: list[int]) -> dict[str, tuple[int, Callable[[], float]]]:
    """(requests it takes, wall seconds of one run) of every peer."""
    pad = arms.workload.tokenizer.pad_token_id or 0
    model = arms.model().eval()
    layers = int(model.config.get_text_config().num_hidden_layers)
    assistant = first_layers(model, arms.model, max(1, layers // 4))
    few = min(arms.args.one_by_one, len(lengths))
    requests = arms.requests
    peers: dict[str, tuple[int, Callable[[], float]]] = {}
    if find_spec("trl"):
        peers["trl"] = (len(lengths), lambda: trl_generate(model, requests, lengths, pad))
    return peers | {
        "hf_generate": (len(lengths), lambda: batched_generate(model, requests, lengths, pad)),
        "hf_one_by_one": (few, lambda: one_by_one(model, requests[:few], lengths[:few], pad)),
        "hf_prompt_lookup": (
            few,
            lambda: one_by_one(model, requests[:few], lengths[:few], pad, prompt_lookup_num_tokens=NUM_LOOKUP_TOKENS),
        ),
        "hf_assisted": (
            few,
            lambda: one_by_one(model, requests[:few], lengths[:few], pad, assistant_model=assistant),
        ),
    }


def report(arms: Arms, lengths: list[int], compared: int, different: int) -> dict[str, Any]:
    """The figures, by key."""
    rates = {name: values for name, values in arms.rates.items() if name != "warm_up"}
    warm, off = np.array(rates["warm"]), np.array(rates["off"])
    peers = [name for name in rates if name not in ("off", "cold", "warm", "off_fma", "warm_fma")]
    stats = {name: arms.stats[name] for name in ("off", "cold", "warm")}
    return {
        "tokens_per_s": {name: float(np.median(values)) for name, values in rates.items()},
        "speedup_off_vs": {name: float(np.median(off / np.array(rates[name]))) for name in peers},
        "speedup_warm_vs": {name: float(np.median(warm / np.array(rates[name]))) for name in peers},
        "speedup_cold_vs_off": float(np.median(np.array(rates["cold"]) / off)),
        "speedup_warm_vs_off": float(np.median(warm / off)),
        "speedup_vs_fma": {
            name: float(np.median(np.array(rates[name]) / np.array(rates[f"{name}_fma"])))
            for name in ("off", "warm")
            if f"{name}_fma" in rates
        },
        "tokens_compared": compared,
        "tokens_different": different,
        "engine_share": {name: shares(one) for name, one in stats.items()},
        "accepted_per_round": {name: one.accepted / max(1, one.rounds) for name, one in stats.items()},
        "forward_tokens": {name: one.forward_tokens for name, one in stats.items()},
        "engine_steps": {name: one.steps for name, one in stats.items()},
        "lengths": {f"p{q}": float(np.percentile(lengths, q)) for q in (0, 50, 90, 100)},
        "num_requests": len(lengths),
        "num_tokens": sum(lengths),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "threads": torch.get_num_threads(),
        "trl_reason": None if find_spec("trl") else "not run: trl is not installed (pip install 'slipstream[bench]')",
        "rounds": arms.args.rounds,
    }


def shares(stats: EngineStats) -> dict[str, float]:
    """Where the time of a run went."""
    parts = {"forward": stats.forward_s, "sample": stats.sample_s, "draft": stats.draft_s, "other": stats.other_s}
    return {name: seconds / stats.total_s for name, seconds in parts.items()}

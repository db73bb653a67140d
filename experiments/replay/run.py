"""What would a policy have taken, on recorded or generated rollouts, on 1 to 4,096 workers?

Without `--run`, generated traces with a set tail on every number of workers of `--workers`, and the replay's error on
real runs of the quickstart's task. With `--run`, the rollouts of a finished job, token by token with the real drafter.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.arms import ARMS, MAX_DRAFT_TOKENS
from slipstream.experiments.long_tail.real import Setting, quiet_collector
from slipstream.experiments.replay.rollouts_file import read_run
from slipstream.experiments.replay.tokens import replay_tokens
from slipstream.experiments.replay.validate import validate
from slipstream.experiments.replay.workers import compare, describe, price_vs_best
from slipstream.experiments.workload import quickstart_workload
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.cost_model import StepCost
from slipstream.rollout.learned import observe_records
from slipstream.rollout.lengths import LengthModel
from slipstream.rollout.replay import CPU_QUICKSTART, H100_7B, synthetic_trace

COSTS = {"h100_7b": H100_7B, "cpu_quickstart": CPU_QUICKSTART}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="replay the rollouts of this finished run")
    parser.add_argument(
        "--cost", choices=sorted(COSTS), default=None, help="default: h100_7b, with --run cpu_quickstart"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 512, 4096], help="(default 1 to 4096)")
    parser.add_argument("--prompts-per-worker", type=int, default=2, help="times 16 samples (default 2)")
    parser.add_argument("--spread", type=float, default=0.9, help="sigma of log lengths between prompts (default 0.9)")
    parser.add_argument("--seeds", type=int, default=3, help="epochs of the validation (default 3; below 2: none)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the validation (default 3)")
    parser.add_argument("--batches", type=int, default=4, help="batches of an epoch of the validation (default 4)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="length limit of the validation (default 512)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Replays, and says what was assumed."""
    if args.run is not None:
        return replay_run(args.run, COSTS[args.cost or "cpu_quickstart"])
    cost = COSTS[args.cost or "h100_7b"]
    out: dict[str, Any] = {}
    for count in args.workers:
        trace = synthetic_trace(count * args.prompts_per_worker, 16, spread=args.spread)
        arms = compare(trace, cost, count, max_live=256)
        out[f"workers_{count}"] = {
            "price_vs_best": price_vs_best(arms),
            "arms": arms,
            "assumed": describe(trace, cost, count, 256),
        }
    if args.seeds >= 2:
        torch.set_num_threads(1)
        setting = Setting("quickstart", 4, 4, args.batches, args.max_new_tokens)
        with quiet_collector():
            out["validation"] = validate(quickstart_workload(), setting, range(args.seeds), args.rounds)
    return out


def replay_run(folder: Path, cost: StepCost) -> dict[str, Any]:
    """All steps of a job, one after the other, for every policy."""
    prompts, steps = read_run(folder)
    longest = max(len(record.tokens) for step in steps for record in step)
    out: dict[str, Any] = {}
    for name, make in ARMS.items():
        started = time.perf_counter()
        drafter, lengths, acceptance, spent = SuffixDrafter(), LengthModel(), AcceptanceModel(), np.zeros(2)
        total = np.zeros(4)
        for step in steps:
            drafter.wait()
            one = replay_tokens(
                step,
                prompts,
                drafter,
                make(),
                cost,
                lengths,
                max_tokens=longest,
                max_draft_tokens=MAX_DRAFT_TOKENS,
                acceptance=acceptance,
                spent=spent,
            )
            total += [one.makespan_s, one.rounds, one.drafted, one.accepted]
            drafter.publish(step[0].step, step)
            observe_records(lengths, step)
            acceptance.fade()
        off = out["off"]["makespan_s"] if out else float(total[0])
        names = ("makespan_s", "rounds", "drafted", "accepted")
        cpu_s = time.perf_counter() - started
        out[name] = dict(zip(names, total.tolist(), strict=True)) | {"of_off": float(total[0]) / off, "cpu_s": cpu_s}
    assumed: dict[str, Any] = {
        "cost_base_ms": 1e3 * cost.base,
        "cost_live_us": 1e6 * cost.live,
        "cost_tok_us": 1e6 * cost.tok,
    }
    assumed["workers"] = "one, with a slot for every request of a step"
    return {"arms": out, "price_vs_best": price_vs_best(out), "num_steps": len(steps), "assumed": assumed}

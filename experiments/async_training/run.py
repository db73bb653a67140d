"""How many more steps per hour does a job make when generation runs ahead of the learner, at the same reward?

Two answers. Measured: the quickstart's long-tailed task on this machine, two workers and a learner, synchronous against
`algo.max_staleness_steps=2`, arms interleaved over `--seeds` seeds; steps per hour after the first two steps, mean
reward of the last third of the steps. Simulated: 64 workers and a trainer that sleeps, the job's own work buffer in
between; the trainer's share of a synchronous step is given, 30 % unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.experiments.async_training.simulation import Scene, Simulation
from slipstream.trainer.errors import ClusterError

NAME = "async"
"""`async` is no name for a Python package."""
WARM_STEPS = 2
COMMAND = "import sys; from slipstream.trainer.main import main; sys.exit(main())"
OTHER_SHARES = (0.2, 0.4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--seeds", type=int, default=3, help="measured jobs of each arm (default 3)")
    parser.add_argument("--steps", type=int, default=32, help="training steps of a measured job (default 32)")
    parser.add_argument(
        "--staleness", type=int, default=2, help="algo.max_staleness_steps of both async arms (default 2)"
    )
    parser.add_argument("--train-share", type=float, default=0.3, help="of a simulated synchronous step (default 0.3)")
    parser.add_argument("--simulated-steps", type=int, default=24, help="steps of a simulated job (default 24)")
    parser.add_argument("--only-simulate", action="store_true", help="no measured jobs")
    parser.add_argument("--timeout-s", type=float, default=1200.0, help="deadline of one measured job (default 1200)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Simulates, then measures."""
    result = simulate_arms(args.staleness, args.train_share, args.simulated_steps)
    for share in OTHER_SHARES:
        other = simulate_arms(args.staleness, share, args.simulated_steps)
        names = ("async_speedup", "idle_share_sync", "idle_share_async")
        result[f"train_share_{share:g}"] = {name: other[name] for name in names}
    if not args.only_simulate:
        result["measured"] = measure(args.seeds, args.steps, args.staleness, args.timeout_s)
    return result


def simulate_arms(staleness: int, train_share: float, num_steps: int) -> dict[str, Any]:
    """Speed-up and idle shares on the default scene. The trainer sleeps train_share of a synchronous step."""
    scene = Scene()
    generation = Simulation(scene, 0, 0.0, num_steps).run()
    train_s = generation.gen_s * train_share / (1.0 - train_share)
    sync = Simulation(scene, 0, train_s, num_steps).run()
    ahead = Simulation(scene, staleness, train_s, num_steps).run()
    return {
        "async_speedup": sync.wall_s / ahead.wall_s,
        "idle_share_sync": sync.idle_share,
        "idle_share_async": ahead.idle_share,
        "simulated_workers": scene.num_workers,
        "train_s": train_s,
        "sync": asdict(sync),
        "async": asdict(ahead),
    }


def measure(num_seeds: int, num_steps: int, staleness: int, timeout_s: float) -> dict[str, Any]:
    """Real jobs, one after the other; medians over the seeds."""
    arms: dict[str, list[dict[str, float]]] = {"sync": [], "async": []}
    for seed in range(num_seeds):
        for name, values in arms.items():
            values.append(summarize(run_job(seed, num_steps, staleness if name == "async" else 0, timeout_s)))
    out: dict[str, Any] = {}
    for key in ("steps_per_hour", "reward", "worker_idle_share", "learner_idle_share"):
        for name, values in arms.items():
            of_arm = [value[key] for value in values]
            out[f"{key}_{name}"] = float(np.median(of_arm))
            out[f"{key}_{name}_all"] = of_arm
    ratios = [b["steps_per_hour"] / a["steps_per_hour"] for a, b in zip(arms["sync"], arms["async"], strict=True)]
    out["speedup"], out["speedup_all"] = float(np.median(ratios)), ratios
    differences = [b["reward"] - a["reward"] for a, b in zip(arms["sync"], arms["async"], strict=True)]
    out["reward_difference_mean"] = float(np.mean(differences))
    out["reward_noise"] = float(np.std([a["reward"] for a in arms["sync"]], ddof=1)) if num_seeds > 1 else None
    out["seeds"], out["steps"], out["max_staleness_steps"] = num_seeds, num_steps, staleness
    return out


def run_job(seed: int, num_steps: int, staleness: int, timeout_s: float) -> list[dict[str, Any]]:
    """The metrics of every step of one job, run in a folder that is removed afterwards."""
    overrides = [
        "experiment=quickstart",
        f"run.seed={seed}",
        f"algo.num_steps={num_steps}",
        f"algo.max_staleness_steps={staleness}",
        "run.name=job",
        "proof.every_steps=0",
        "checkpoint.every_steps=0",
        "tracking=disabled",
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", COMMAND, "train", *overrides]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode:
            raise ClusterError(f"bench async: a job failed: {done.stderr.strip().splitlines()[-1][:300]}")
        text = (Path(folder) / "runs" / "job" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def summarize(records: list[dict[str, Any]]) -> dict[str, float]:
    """Rates after the first steps; idle shares are of the whole step, learning and waiting included."""
    rest = records[WARM_STEPS:]
    step_s = sum(record["timing_s/step"] for record in rest)
    busy_s = 0.0
    for record in rest:
        # A synchronous job states the idle share within the rollouts; the workers rest during the update as well.
        span = record["timing_s/step"] if "async/groups_open" in record else record["timing_s/gen"]
        busy_s += (1.0 - record["perf/worker_idle_share"]) * span
    last = records[-max(1, len(records) // 3) :]
    return {
        "steps_per_hour": 3600.0 * len(rest) / step_s,
        "reward": float(np.mean([record["critic/rewards/mean"] for record in last])),
        "worker_idle_share": 1.0 - busy_s / step_s,
        "learner_idle_share": 1.0 - sum(record["timing_s/update_actor"] for record in rest) / step_s,
    }

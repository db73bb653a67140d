"""What does a job lose when its processes are killed or hang, its disk fills up and its transfers are cut?

The same synchronous job twice on a Ray of two nodes (two raylets on loopback): undisturbed, then under a seeded
schedule of faults, each done for real and from outside. After every fault the job recovers by itself, or it stops with
one line on stderr and is resumed with `slipstream train --resume`. What counts is read from the run folders: rollouts
lost or trained on twice, tokens, rewards and final weights that differ from the undisturbed job's.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.experiments.chaos.accounting import compare, expected_keys, read_books, weights_difference
from slipstream.experiments.chaos.faults import KINDS, Scene, make_schedule
from slipstream.experiments.chaos.reward import HANG_VARIABLE
from slipstream.experiments.chaos.small_disk import SmallDisk
from slipstream.experiments.chaos.supervisor import MARGIN_STEPS, Outcome, Supervisor
from slipstream.experiments.chaos.train_process import TrainProcess
from slipstream.experiments.chaos.two_nodes import TwoNodes
from slipstream.trainer.errors import ClusterError, ConfigError, StalledError

NUM_GROUPS, NUM_SAMPLES = 4, 8
NUM_WORKERS = 3
"""With the learner four actors of one CPU each on two nodes of two: each node has at least one worker, one has two."""
UNDISTURBED_TIMEOUT_S = 1200.0
FIRST_FAULT_STEP = 3
GAP_STEPS = MARGIN_STEPS + 1
JOB = [
    "experiment=quickstart_short",
    f"algo.num_prompts_per_step={NUM_GROUPS}",
    f"sampling.num_samples_per_prompt={NUM_SAMPLES}",
    "data.task.max_level=4",
    f"cluster.num_workers={NUM_WORKERS}",
    "cluster.threads_for_learner=1",
    "checkpoint.every_steps=2",
    "proof.every_steps=0",
    "tracking=disabled",
    "reward.rule=custom",
    "reward.function=slipstream.experiments.chaos.reward.score",
    "reward.timeout_s=2.0",
    "watchdog.timeout_s=150.0",
    "cluster.worker_timeout_s=8.0",
    "cluster.start_timeout_s=200.0",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--faults", type=int, default=33, help="faults in the one job (default 33)")
    parser.add_argument("--seed", type=int, default=0, help="of the job and of the schedule (default 0)")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="kinds of faults, with commas between (default: all of them)"
    )
    parser.add_argument("--steps", type=int, default=0, help="steps of the job (default: as many as the faults need)")
    parser.add_argument("--deadline-s", type=float, default=240.0, help="for a life to make a new step (default 240)")
    parser.add_argument("--logs", type=Path, help="keep all output and the records of both jobs in this new folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Undisturbed, disturbed, compared."""
    kinds = [kind for kind in str(args.kinds).split(",") if kind]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigError(f"--kinds {args.kinds}: no such kind; allowed: {', '.join(KINDS)}")
    needed = FIRST_FAULT_STEP + GAP_STEPS * args.faults
    num_steps = args.steps or needed
    if num_steps < needed:
        raise ConfigError(f"--steps {num_steps}: too few; allowed: at least {needed} for {args.faults} faults")
    schedule = make_schedule(args.seed, args.faults, FIRST_FAULT_STEP, GAP_STEPS, kinds)
    with _stage(args.logs, args.seed, num_steps) as stage:
        undisturbed_s = _run_undisturbed(stage)
        started = time.monotonic()
        scene = stage.disturbed()
        try:
            outcomes = Supervisor(scene, num_steps, args.deadline_s).run(schedule)
        finally:
            scene.job.kill()
        disturbed_s = time.monotonic() - started
        books = [read_books(path) for path in (stage.undisturbed_dir, scene.job.run_dir)]
        counts = compare(expected_keys(args.seed, num_steps, NUM_GROUPS, NUM_SAMPLES), *books)
        difference = weights_difference(stage.undisturbed_dir, scene.job.run_dir)
        lives, disk = scene.job.num_lives, stage.disk.kind
    return {
        "faults": len(outcomes),
        **counts,
        "weights_max_abs_difference": difference,
        **summarize(outcomes),
        "steps": num_steps,
        "rollouts": num_steps * NUM_GROUPS * NUM_SAMPLES,
        "process_lives": lives,
        "disk": disk,
        "undisturbed_s": undisturbed_s,
        "disturbed_s": disturbed_s,
        "events": [_event(outcome) for outcome in outcomes],
    }


def summarize(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts over all faults, and of every kind: how it ended, and seconds of standstill."""
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        mine = [outcome for outcome in outcomes if outcome.fault.kind == kind]
        if mine:
            seconds = [outcome.standstill_s for outcome in mine]
            kinds[kind] = {
                "faults": len(mine),
                "recovered": sum(outcome.ended == "recovered" for outcome in mine),
                "resumed": sum(outcome.ended == "resumed" for outcome in mine),
                "standstill_s_median": float(np.median(seconds)),
                "standstill_s_max": max(seconds),
            }
    return {
        "recovered": sum(outcome.ended == "recovered" for outcome in outcomes),
        "resumed": sum(outcome.ended == "resumed" for outcome in outcomes),
        "hung": sum(outcome.hung for outcome in outcomes),
        "unclear_stops": sum(outcome.num_unclear for outcome in outcomes),
        "kinds": kinds,
    }


@dataclass(slots=True)
class _Stage:
    """Where both jobs run: their disk, their Ray, their overrides."""

    folder: Path
    disk: SmallDisk
    nodes: TwoNodes
    overrides: list[str]

    @property
    def undisturbed_dir(self) -> Path:
        return self.folder / "undisturbed"

    def job(self, run_dir: Path, environment: dict[str, str]) -> TrainProcess:
        logs = self.folder / f"logs-{run_dir.name}"
        logs.mkdir()
        place = [f"run.dir={run_dir.parent}", f"run.name={run_dir.name}"]
        return TrainProcess([*self.overrides, *place], run_dir, logs, self.nodes.environment | environment)

    def disturbed(self) -> Scene:
        hang_file = self.folder / "hang"
        job = self.job(self.disk.folder / "disturbed", {HANG_VARIABLE: str(hang_file)})
        return Scene(job, self.nodes, self.disk, hang_file)


@contextmanager
def _stage(logs: Path | None, seed: int, num_steps: int) -> Iterator[_Stage]:
    """Everything is ended and unmounted afterwards, on SIGTERM too; with `logs`, the files are kept there."""
    if logs is not None and logs.exists():
        raise ConfigError(f"--logs {logs}: it exists already; allowed: a folder that does not")
    folder = Path(tempfile.mkdtemp(prefix="slipstream-chaos-"))
    disk = SmallDisk(folder / "disk")
    nodes = TwoNodes(folder, (NUM_WORKERS + 1) // 2)
    overrides = [*JOB, f"run.seed={seed}", f"algo.num_steps={num_steps}", f"cluster.address={nodes.address}"]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        nodes.start()
        yield _Stage(folder, disk, nodes, overrides)
    finally:
        nodes.close()
        if logs is not None:
            shutil.copytree(folder, logs, ignore=shutil.ignore_patterns("filler", "sockets", "ray_token"))
        disk.close()
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _run_undisturbed(stage: _Stage) -> float:
    """Runs the job to its end; seconds."""
    started = time.monotonic()
    job = stage.job(stage.undisturbed_dir, {})
    job.start()
    try:
        while job.ended() is None:
            if time.monotonic() - started > UNDISTURBED_TIMEOUT_S:
                raise StalledError(f"bench chaos: the undisturbed job takes longer than {UNDISTURBED_TIMEOUT_S:g} s")
            time.sleep(0.1)
        if job.ended():
            raise ClusterError(f"bench chaos: the undisturbed job failed: {job.errors().strip()[-300:]}")
    finally:
        job.kill()
    return time.monotonic() - started


def _event(outcome: Outcome) -> dict[str, Any]:
    return {
        "kind": outcome.fault.kind,
        "step": outcome.step,
        "struck": outcome.notes,
        "ended": "hung" if outcome.hung else outcome.ended,
        "stops": [stop[:400] for stop in outcome.stops],
        "standstill_s": outcome.standstill_s,
    }

"""Which budget policy gets a batch with a long tail done first, and is any slower than no speculation?

Real runs of the quickstart's task on the embedded engine, cold and warm, and replays at scale. One thread: with it a
pass's time does not depend on what else the machine does with its other cores.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.experiments.long_tail.real import Arms, Run, Setting, measure, quiet_collector
from slipstream.experiments.long_tail.scale import closed_form_gap, generated, paper_setting, solve_ms
from slipstream.experiments.long_tail.timeline import Recorder
from slipstream.experiments.workload import quickstart_workload
from slipstream.trainer.timeline_plots import save_png, timeline_figure

SETTINGS = (
    Setting("quickstart", num_prompts=4, num_samples=4, num_batches=4),
    Setting("large", num_prompts=8, num_samples=8, num_batches=2),
)
"""A worker of the quickstart has 4 samples of each of 4 prompts; `large` has four times as many live."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--seeds", type=int, default=3, help="prompt sets and samples (default 3)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of every seed (default 3)")
    parser.add_argument("--visits", type=int, default=16, help="earlier visits of warm prompts (default 16)")
    parser.add_argument("--settings", nargs="+", choices=[one.name for one in SETTINGS], help="(default all)")
    parser.add_argument("--batches", type=int, help="batches of an epoch (default 4, large 2)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="the length limit (default 512)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64], help="of generated traces")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="a PNG per arm goes here (default: pictures/ beside --json)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Real runs, then replays."""
    torch.set_num_threads(args.threads)
    workload = quickstart_workload()
    out: dict[str, Any] = {"makespan_s": {}, "of_off": {}, "engine": {}, "pictures": None}
    pictures = picture_folder(args)
    compared = different = 0
    for setting in chosen_settings(args):
        arms = Arms(workload, setting)
        with quiet_collector():
            runs = measure(arms, range(args.seeds), args.visits, args.rounds)
        compared, different = compared + arms.compared, different + arms.different
        for kind, by_arm in runs.items():
            add_setting(out, f"{setting.name}_{kind}", by_arm)
        if pictures is not None and out["pictures"] is None:
            draw(arms, pictures, args.visits)
            out["pictures"] = str(args.pictures or f"{pictures.name}/ beside this file")
    ratios = out["of_off"]
    out["price_vs_best"] = {key: by["price"] / min(by.values()) for key, by in ratios.items()}
    out["worst_price_vs_best"] = max(out["price_vs_best"].values())
    out["worst_regret_vs_off"] = max(by["price"] - 1.0 for by in ratios.values())
    out["warm_reduction"] = {key: 1.0 - by["price"] for key, by in ratios.items() if key.endswith("_warm")}
    out["tokens_compared"], out["tokens_different"] = compared, different
    gaps = closed_form_gap(args.seeds)
    out["closed_form_gap"], out["closed_form_gap_published"] = gaps["corrected"], gaps["published"]
    out["solve_ms_4096"] = solve_ms()
    out["replay_price_vs_best"] = generated(args.seeds, args.workers)
    out["paper_setting"] = paper_setting(args.seeds)
    return out


def chosen_settings(args: argparse.Namespace) -> list[Setting]:
    """Those of --settings, at the size asked for."""
    chosen = [one for one in SETTINGS if not args.settings or one.name in args.settings]
    return [
        replace(one, num_batches=args.batches or one.num_batches, max_new_tokens=args.max_new_tokens) for one in chosen
    ]


def picture_folder(args: argparse.Namespace) -> Path | None:
    """--pictures, or pictures/ beside --json, which the command adds; None without both."""
    written: Path | None = getattr(args, "json", None)
    chosen: Path | None = args.pictures
    return chosen or (written.absolute().parent / "pictures" if written is not None else None)


def add_setting(out: dict[str, Any], key: str, by_arm: dict[str, list[list[Run]]]) -> None:
    """Seconds of all seeds, the median round of each; a ratio is the median of those within a round."""
    seconds = {name: np.array([[run.makespan_s for run in runs] for runs in seeds]) for name, seeds in by_arm.items()}
    out["makespan_s"][key] = {name: float(np.median(values, axis=1).sum()) for name, values in seconds.items()}
    # Sums over seeds within a round, so that the longest epochs weigh most, as they do in a job.
    totals = {name: values.sum(axis=0) for name, values in seconds.items()}
    out["of_off"][key] = {name: float(np.median(total / totals["off"])) for name, total in totals.items()}
    last = {name: [runs[-1].stats for runs in seeds] for name, seeds in by_arm.items()}
    out["engine"][key] = {
        name: {
            "steps": sum(one.steps for one in stats),
            "drafted": sum(one.drafted for one in stats),
            "accepted": sum(one.accepted for one in stats),
            "forward_tokens": sum(one.forward_tokens for one in stats),
        }
        for name, stats in last.items()
    }


def draw(arms: Arms, folder: Path, num_visits: int) -> None:
    """A picture of the first warm epoch per arm."""
    folder.mkdir(parents=True, exist_ok=True)
    epoch = arms.epoch(0, num_visits)
    for name in arms.names:
        recorder = Recorder()
        arms.run(name, epoch, recorder)
        figure = timeline_figure(recorder.lines, title=f"{name}: {len(recorder.lines)} rollouts, warm")
        save_png(figure, str(folder / f"{name}.png"))

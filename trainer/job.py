"""One job from its settings to its report: data, state, Ray, the loop, and how it may end.

Invariants
- Data and rewards are checked before Ray starts; whatever was opened is closed, however the job ends.
- Every way to fail is one line: a deadline or a stall is a StalledError, a lost actor a ClusterError; Ctrl-C and
  SIGTERM say how to carry on.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slipstream.conf.schema import Settings
from slipstream.rollout.engine import EngineError
from slipstream.trainer import checkpoint
from slipstream.trainer.config import model_folder
from slipstream.trainer.data.prompts import PromptSet, load_prompts
from slipstream.trainer.data.rewards import RewardScorer
from slipstream.trainer.data.tokenizer import ChatTokenizer, load_tokenizer
from slipstream.trainer.errors import ClusterError, StalledError
from slipstream.trainer.job_state import JobState
from slipstream.trainer.loop import TrainLoop
from slipstream.trainer.progress import format_summary
from slipstream.trainer.report import write_report
from slipstream.trainer.tracking import Tracker, read_jsonl
from slipstream.trainer.watchdog import Watchdog

INTERRUPTED = 130
MAX_LINE = 500
TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def run_job(settings: Settings, run_dir: Path, resume: bool) -> int:
    """Runs a job to its end in `run_dir`; returns the exit code. Data and rewards are checked before Ray starts."""
    folder = model_folder(settings.model.path)
    model_path = str(folder.resolve()) if folder is not None else settings.model.path
    tokenizer = load_tokenizer(model_path)
    prompts = load_prompts(settings.data, tokenizer, settings.run.seed)
    for left_out in prompts.left_out:
        print(f"data: {left_out.line()}", file=sys.stderr)
    scorer = RewardScorer(settings.reward)
    try:
        scorer.check(prompts.train)
        with _errors_as_lines():
            return _run_on_ray(settings, run_dir, resume, model_path, tokenizer, prompts, scorer)
    finally:
        scorer.close()


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    from slipstream.rollout.actors import PoolTimeout

    try:
        yield
    except PoolTimeout as error:
        raise StalledError(_one_line(error)) from error
    except EngineError as error:
        raise ClusterError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    """What Ray and torch say of a failure within an actor has many lines, and colours for a terminal."""
    return " ".join(TERMINAL_COLOUR.sub("", str(error)).split())[:MAX_LINE]


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, ends the job as Ctrl-C does.

    Within ray_cluster, because Ray installs a handler of its own, which prints the stack of its C++ code.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _run_on_ray(
    settings: Settings,
    run_dir: Path,
    resume: bool,
    model_path: str,
    tokenizer: ChatTokenizer,
    prompts: PromptSet,
    scorer: RewardScorer,
) -> int:
    from slipstream.trainer.cluster import ray_cluster

    found = checkpoint.latest(run_dir) if resume else None
    if found is not None:
        state = JobState.load(found, run_dir, settings.drafter.window_epochs)
        print(f"resume: {found} (step {state.step})")
    else:
        state = JobState.start(run_dir, settings.drafter.window_epochs)
        if resume:
            print(f"resume: no complete checkpoint in {run_dir}, starting from step 1")
    tracker = Tracker(run_dir, settings.model_dump(mode="json"), settings.tracking, state.wandb_run_id)
    state.wandb_run_id = tracker.wandb_run_id
    exit_code = 1
    watchdog = Watchdog(settings.watchdog.timeout_s, run_dir)
    try:
        if resume:
            tracker.truncate_after(state.step)
        with ray_cluster(settings.cluster), _sigterm_interrupts():
            loop = TrainLoop(settings, run_dir, model_path, tokenizer, prompts, scorer, tracker, state, watchdog)
            try:
                loop.start(found)
                # The start has a deadline of its own.
                with watchdog:
                    loop.run()
            except KeyboardInterrupt:
                if watchdog.stalled is None and loop.saving_step is not None:
                    print(f"\nwaiting for the checkpoint of step {loop.saving_step}; Ctrl-C again gives it up")
                    loop.close(settings.checkpoint.timeout_s)
                raise
            finally:
                loop.close()
        exit_code = 0
    except KeyboardInterrupt:
        if watchdog.stalled is not None:
            raise StalledError(watchdog.stalled) from None
        print(
            f"\ninterrupted after step {state.step}; carry on: slipstream train --resume {run_dir}",
            file=sys.stderr,
        )
        exit_code = INTERRUPTED
    finally:
        tracker.finish(exit_code)
        state.log.close()
    if exit_code == 0:
        records, _ = read_jsonl(run_dir / "metrics.jsonl")
        print(format_summary(records))
        print(f"report: {write_report(run_dir)}")
    return exit_code

"""The training loop: samples, update, weights, history, one step after the other.

Invariants
- Where the samples come from is the source's business: step by step (token-identical whatever runs them), or running
  ahead within algo.max_staleness_steps.
- With algo.max_staleness_steps=0 step s samples with the weights of version s - 1, and a resumed job repeats what the
  killed one would have done.
- A step is logged before the next one starts; a checkpoint holds the state after a whole step.
- A proof step replays the same requests with drafting off before the weights move, and changes nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slipstream.conf.schema import Settings
from slipstream.rollout.types import Rollout, Sampling
from slipstream.rollout.weight_handle import ComingHandle
from slipstream.trainer.data.prompts import PromptSet
from slipstream.trainer.data.rewards import RewardScorer
from slipstream.trainer.data.tokenizer import TOKENIZER_FILES, ChatTokenizer
from slipstream.trainer.errors import SlipstreamError
from slipstream.trainer.evaluation import Evaluation
from slipstream.trainer.job_state import JobState
from slipstream.trainer.progress import format_progress
from slipstream.trainer.resize import resize
from slipstream.trainer.samples import pricing_metrics, rollout_records, sample_metrics, speculation_metrics
from slipstream.trainer.tracking import Tracker
from slipstream.trainer.watchdog import ANSWER_TIMEOUT_S, Watchdog

if TYPE_CHECKING:
    from slipstream.trainer.learner_group import LearnerCall

CLOSE_TIMEOUT_S = 30.0
"""How long a job that failed waits for a checkpoint under way."""
_IMPORTED_AT = time.perf_counter()


class TrainLoop:
    """Owns the actors and the state of one job."""

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        model_path: str,
        tokenizer: ChatTokenizer,
        prompts: PromptSet,
        scorer: RewardScorer,
        tracker: Tracker,
        state: JobState,
        watchdog: Watchdog,
    ) -> None:
        self.settings, self.run_dir, self.state = settings, run_dir, state
        self.tokenizer, self.prompts, self.scorer, self.tracker = tokenizer, prompts, scorer, tracker
        self.order = prompts.order(settings.algo.num_prompts_per_step)
        self.sampling = Sampling(
            max_new_tokens=settings.sampling.max_new_tokens,
            temperature=settings.sampling.temperature,
            top_p=settings.sampling.top_p,
            top_k=settings.sampling.top_k,
            seed=settings.run.seed,
            stop_token_ids=tokenizer.stop_token_ids,
        )
        self.watchdog = watchdog
        self.evaluation = Evaluation(settings.evaluation, prompts.validation, self.sampling, scorer, tokenizer)
        self._model_path = model_path
        self._step_seconds: list[float] = []
        self._pool: Any = None
        self._placement: Any = None
        self._source: Any = None
        self._saver: Any = None
        self._proof_steps = range(0) if settings.algo.streams else settings.proof.steps(settings.algo.num_steps)

    # ---- start

    def start(self, resumed_from: Path | None) -> None:
        """Starts the actors, waits for them together, restores a checkpoint."""
        from slipstream.rollout.actors import dump_stacks
        from slipstream.rollout.placement import Placement
        from slipstream.rollout.pool import RolloutPool
        from slipstream.rollout.streaming_pool import StreamingPool
        from slipstream.trainer.cluster import bundles, learner_spec, pool_limits, worker_spec
        from slipstream.trainer.learner_group import LearnerGroup
        from slipstream.trainer.rollout_source import SourceContext, SyncSource
        from slipstream.trainer.saver import CheckpointSaver
        from slipstream.trainer.streaming_source import StreamingSource

        cluster, deadline = self.settings.cluster, self.settings.cluster.start_timeout_s
        evaluated = self.prompts.validation if self.settings.evaluation.every_steps else []
        longest = max(len(prompt.tokens) for prompt in [*self.prompts.train, *evaluated])
        spec = worker_spec(self.settings, self._model_path, longest)
        streams = self.settings.algo.streams
        pool_class = StreamingPool if streams else RolloutPool
        self._placement = place = Placement(cluster.placement, bundles(cluster), deadline)
        self._pool = pool_class(
            spec,
            cluster.num_workers,
            cluster.cpus_per_worker,
            cluster.gpus_per_worker,
            cluster.routing,
            cluster.steal,
            pool_limits(cluster),
            place,
        )
        learner_args = learner_spec(self.settings, self._model_path, self.run_dir)
        self._learner = LearnerGroup(learner_args, cluster, placement=place)
        files = [path for name in TOKENIZER_FILES if (path := self.tokenizer.folder / name).is_file()]
        self._saver = CheckpointSaver(self.settings.checkpoint, self.run_dir, self._learner, files, self._ask)
        context = SourceContext(
            self.settings,
            self.prompts,
            self.order,
            self.sampling,
            self.scorer,
            self.tokenizer,
            self.state,
            self.watchdog,
        )
        self._source = StreamingSource(self._pool, context) if streams else SyncSource(self._pool, context)
        self.watchdog.describe(self._source.describe)
        learner = self._learner.ranks
        self.watchdog.describe(lambda: _sections(self._pool.dump_stacks(ANSWER_TIMEOUT_S / 2)))
        self.watchdog.describe(lambda: _sections(dump_stacks(learner, ANSWER_TIMEOUT_S / 2)))
        facts = self._pool.ready(deadline)[0]
        # Not through the source, which would start rollouts: indexes are shared, and a checkpoint is read, before that.
        self._learner.ready().result()
        if self.settings.drafter.name == "suffix" and self.settings.drafter.share_index:
            self._pool.share_indexes(deadline)
        print(
            f"{self.settings.experiment_name}: {cluster.num_workers} rollout workers on {facts['device']}, "
            f"{facts['kernels']} kernels ({facts['reason']}), ready after {process_age_s():.1f} s"
        )
        if facts["device"].startswith("cuda"):
            print(f"engine: {facts['steps']}")
        print(f"run folder: {self.run_dir}")
        self._startup_s: float | None = process_age_s()
        if resumed_from is not None:
            self._learner.load(str(resumed_from.resolve())).result()
            self._publish_weights(lambda call: call.result())
            records = sorted(self.state.history, key=lambda record: record.step)
            self._pool.publish(self.state.step, records, self.state.learned, deadline)

    @property
    def saving_step(self) -> int | None:
        """The step whose checkpoint is being written at the moment."""
        return None if self._saver is None else self._saver.step

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Ends a checkpoint under way, within that time, and tidies up what the workers would leave behind."""
        if self._saver is not None:
            self._saver.close(timeout_s)
        if self._pool is not None:
            self._pool.close()
        if self._placement is not None:
            self._placement.remove()
        self._saver = self._pool = self._placement = None

    def _ask(self, call: LearnerCall) -> Any:
        result = self._source.wait(call)
        self.watchdog.progress(call.what)
        return result

    def _publish_weights(self, wait: Callable[[LearnerCall], Any]) -> dict[str, float]:
        """Brings the learners' weights to the workers; metrics. The driver holds their handle, never the weights."""
        wait(self._learner.gather(self.state.step))
        call = self._learner.weights(self.state.step)
        metrics = self._source.publish_weights(ComingHandle(call.ref, lambda: wait(call)))
        self.watchdog.progress(f"weights of version {self.state.step}")
        return metrics

    # ---- steps

    def run(self) -> None:
        """All remaining steps, and a checkpoint at the end."""
        num_steps, every = self.settings.algo.num_steps, self.settings.checkpoint.every_steps
        early = self._evaluate(0) if self.state.step == 0 and self.settings.evaluation.at_start else {}
        while self.state.step < num_steps:
            started = time.perf_counter()
            metrics, early = early | self.step(self.state.step + 1), {}
            if self.state.step == num_steps:
                metrics |= self._source.finish()
            metrics |= self._saver.poll(self.state)
            if self.state.step == num_steps or (every and self.state.step % every == 0):
                metrics |= self._save(metrics)
            metrics["timing_s/step"] = time.perf_counter() - started
            if self._startup_s is not None:
                metrics["timing_s/startup"], self._startup_s = self._startup_s, None
            self._step_seconds.append(metrics["timing_s/step"])
            metrics |= self._pool.metrics()
            self.tracker.log(metrics, self.state.step)
            self._saver.start()
            left = float(np.mean(self._step_seconds[-8:])) * (num_steps - self.state.step)
            print(format_progress(self.state.step, num_steps, metrics, left), flush=True)
            self.watchdog.progress(f"step {self.state.step}")
            for line in resize(self._pool, self.run_dir):
                print(f"step {self.state.step}: {line}", flush=True)
        self._saver.finish(self.state)

    def step(self, step: int) -> dict[str, float]:
        """One training step; returns its metrics. Advances the state."""
        collected = self._source.collect(step)
        scored = collected.scored
        metrics = speculation_metrics(scored.rollouts, collected.stats) | collected.metrics
        metrics |= self.state.observe_step(collected.observed)
        metrics |= pricing_metrics([worker.metrics for worker in collected.observed])
        clock = _Clock()
        if step in self._proof_steps:
            metrics |= self._prove(scored.rollouts, collected.gen_s)
            clock.lap("proof")
        for reason, count in scored.reasons.items():
            print(f"step {step}: {count} samples left out of the loss: {reason}", file=sys.stderr)
        metrics |= sample_metrics(scored, self.sampling.max_new_tokens)
        clock.restart()
        metrics |= self._update(scored.train_samples(), step)
        clock.lap("update_actor")
        self.state.step = step
        metrics |= self._publish_weights(self._ask)
        clock.lap("update_weights")
        history = scored.history(step)
        self.state.remember(history)
        self._source.publish_history(step, history, self.state.learned.without_lengths())
        clock.lap("publish")
        if self.settings.evaluation.every_steps:
            metrics |= self._evaluate(step)
            clock.lap("testing")
        self._observe_lengths(scored.rollouts)
        self.tracker.log_rollouts(rollout_records(scored, step, self.settings.sampling.num_samples_per_prompt))
        tokens = sum(len(rollout.tokens) for rollout in scored.rollouts)
        rates = {
            "perf/throughput": tokens / collected.gen_s,
            "perf/total_num_tokens": float(tokens),
            "training/global_step": float(step),
            "training/epoch": float(collected.epoch),
        }
        return metrics | clock.seconds | rates

    def _evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the evaluations that have ended; starts one where it is due."""
        every = self.settings.evaluation.every_steps
        if step % every and step:
            return self.evaluation.ended()
        return self._source.evaluate(self.evaluation, step)

    def _update(self, samples: list[Any], step: int) -> dict[str, float]:
        if not samples:
            print(f"step {step}: no sample has a reward; the update is skipped", file=sys.stderr)
            return {"actor/num_updates": 0.0}
        return self._ask(self._learner.update(samples, step))

    def _observe_lengths(self, rollouts: list[Rollout]) -> None:
        ended = [rollout for rollout in rollouts if rollout.finish in ("stop", "length")]
        lengths = np.array([len(rollout.tokens) for rollout in ended])
        self.state.observe_lengths([rollout.request.prompt_id for rollout in ended], lengths)

    # ---- proof

    def _prove(self, drafted: list[Rollout], seconds_on: float) -> dict[str, float]:
        started = time.perf_counter()
        plain = self._source.replay(drafted)
        seconds_off = time.perf_counter() - started
        compared, different = compare_tokens(drafted, plain)
        return {
            "proof/gen_on_s": seconds_on,
            "proof/gen_off_s": seconds_off,
            "proof/tokens_compared": float(compared),
            "proof/tokens_different": float(different),
        }

    # ---- checkpoint

    def _save(self, metrics: dict[str, float]) -> dict[str, float]:
        self.state.next_group, self.state.outstanding_groups = self._source.position()
        return self._saver.save(self.state, metrics)


def compare_tokens(first: list[Rollout], second: list[Rollout]) -> tuple[int, int]:
    """(tokens compared, tokens that differ) over two lists of rollouts of the same requests, in the same order.

    A rollout that is longer than its twin differs in every token beyond the twin's end.
    """
    compared = different = 0
    for a, b in zip(first, second, strict=True):
        if a.request.uid != b.request.uid:
            raise SlipstreamError(f"compared rollouts of uids {a.request.uid} and {b.request.uid}")
        common = min(len(a.tokens), len(b.tokens))
        compared += max(len(a.tokens), len(b.tokens))
        different += int((a.tokens[:common] != b.tokens[:common]).sum()) + abs(len(a.tokens) - len(b.tokens))
    return compared, different


def process_age_s() -> float:
    """Seconds since this process was started, its imports included (Linux: from /proc; elsewhere 0 at import)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.perf_counter() - _IMPORTED_AT


def _sections(texts: dict[str, str]) -> str:
    return "\n\n".join(f"{name}, {text}" for name, text in texts.items())


class _Clock:
    """Wall seconds of consecutive parts, under verl's timing_s/ names."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def restart(self) -> None:
        """What lies behind belongs to no part."""
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The part that ends now."""
        now = time.perf_counter()
        self.seconds[f"timing_s/{name}"], self._last = now - self._last, now

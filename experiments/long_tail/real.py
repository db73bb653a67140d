"""Real rollouts of the quickstart's task, one engine in this process, for every budget policy.

Invariants: every arm samples the same requests with the same weights, and its tokens are compared with those of `off`;
arms take turns within a round; each arm is a job of its own that keeps what it measured of costs and acceptance, and
whose drafter and lengths know the seed's earlier visits and nothing else; no guard, so that an arm is its policy.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from slipstream.drafter.base import HistoryRecord
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.experiments.arms import ARMS
from slipstream.experiments.long_tail.timeline import Recorder
from slipstream.experiments.workload import Workload, open_prompts
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.learned import observe_records
from slipstream.rollout.lengths import LengthModel
from slipstream.rollout.pricing import Pricing
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout
from slipstream.trainer.data.prompts import Prompt
from slipstream.trainer.loop import compare_tokens

TIMED_STEP = 1000
"""Requests of the timed epochs: steps from here on, so that their noise is not that of the earlier visits."""


@dataclass(frozen=True, slots=True)
class Setting:
    """num_batches steps of num_prompts prompts with num_samples samples each; a batch runs to its end before the next
    one begins, as in training."""

    name: str
    num_prompts: int
    num_samples: int
    num_batches: int
    max_new_tokens: int = 512

    @property
    def num_live(self) -> int:
        """Requests of a batch; all of them are live at once."""
        return self.num_prompts * self.num_samples


@dataclass(slots=True)
class Job:
    """What an arm keeps from run to run."""

    pricing: Pricing
    acceptance: AcceptanceModel = field(default_factory=AcceptanceModel)


@dataclass(frozen=True, slots=True)
class Run:
    """One epoch of one arm. makespan_s: of its batches, one after the other."""

    makespan_s: float
    stats: EngineStats
    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True)
class Epoch:
    """The requests of the timed epoch, batch by batch, and the visits before it, each batch by batch."""

    batches: list[list[Request]]
    visits: list[list[list[HistoryRecord]]]


@contextmanager
def quiet_collector() -> Iterator[None]:
    """What exists now is left out of garbage collections, so that one before every timed batch takes milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Arms:
    """The arms of one setting on one engine."""

    def __init__(self, workload: Workload, setting: Setting, names: Sequence[str] = tuple(ARMS)) -> None:
        self.workload, self.setting, self.names = workload, setting, tuple(names)
        longest = max(len(prompt.tokens) for prompt in workload.prompts.train) + setting.max_new_tokens
        self.engine = TorchEngine(workload.model(), max_live_requests=setting.num_live, max_len=longest)
        self.jobs = {name: Job(Pricing(setting.num_live)) for name in self.names}
        self.compared = self.different = 0

    def epoch(self, seed: int, num_visits: int) -> Epoch:
        """Prompts of this seed in batches, and `num_visits` earlier visits sampled by the same policy."""
        setting, prompts = self.setting, self.prompts(seed)
        self.engine.drafter = self.engine.budget = None
        self.engine.pricing = Pricing(setting.num_live)
        visits = []
        for visit in range(1, num_visits + 1):
            batches = [self._requests(batch, 100 * seed + visit) for batch in prompts]
            visits.append([as_records(self._drain(batch), visit) for batch in batches])
        return Epoch([self._requests(batch, TIMED_STEP + seed) for batch in prompts], visits)

    def prompts(self, seed: int) -> list[list[Prompt]]:
        """num_batches lists of num_prompts prompts, drawn over all difficulties."""
        count = self.setting.num_prompts
        order = np.random.default_rng(seed).permutation(len(self.workload.prompts.train))
        drawn = [self.workload.prompts.train[i] for i in order[: count * self.setting.num_batches]]
        return [drawn[i : i + count] for i in range(0, len(drawn), count)]

    def _requests(self, prompts: Sequence[Prompt], step: int) -> list[Request]:
        return self.workload.requests(prompts, self.setting.num_samples, self.setting.max_new_tokens, step=step)

    def _drain(self, requests: list[Request]) -> list[Rollout]:
        self.engine.submit(requests)
        by_uid = {rollout.request.uid: rollout for rollout in self.engine.drain(timeout_s=3600)}
        return [by_uid[request.uid] for request in requests]

    def run(self, name: str, epoch: Epoch, recorder: Recorder | None = None) -> Run:
        """The epoch with this arm. Between batches its drafter and its lengths learn, outside the measured time."""
        job, engine = self.jobs[name], self.engine
        drafter, lengths = SuffixDrafter(), LengthModel()
        open_prompts(drafter, [request for batch in epoch.batches for request in batch])
        for visit in epoch.visits:
            for batch in visit:
                observe_records(lengths, batch)
            drafter.publish(visit[0][0].step, [record for batch in visit for record in batch])
        off = name == "off"
        engine.drafter, engine.budget = (None, None) if off else (drafter, ARMS[name]())
        engine.pricing = job.pricing
        engine.stats(reset=True)
        rollouts: list[Rollout] = []
        seconds = 0.0
        for requests in epoch.batches:
            drafter.wait()
            job.pricing.learn_lengths(lengths)
            engine.learn_acceptance(job.acceptance)
            gc.collect()
            started = time.perf_counter()
            done = self._drain(requests) if recorder is None else recorder.drain(engine, requests)
            seconds += time.perf_counter() - started
            rollouts += done
            records = as_records(done, TIMED_STEP)
            observe_records(lengths, records)
            drafter.publish(TIMED_STEP, records)
        return Run(seconds, engine.stats(reset=True), rollouts)

    def round(self, epoch: Epoch, first: int = 0) -> dict[str, Run]:
        """Every arm once, beginning with the `first`; tokens are compared with those of the arm `off`."""
        turn = [*self.names[first % len(self.names) :], *self.names[: first % len(self.names)]]
        runs = {name: self.run(name, epoch) for name in turn}
        for name, run in runs.items():
            if name != "off":
                compared, different = compare_tokens(run.rollouts, runs["off"].rollouts)
                self.compared += compared
                self.different += different
        return runs


def as_records(rollouts: Sequence[Rollout], step: int) -> list[HistoryRecord]:
    """What drafters and lengths remember of these rollouts."""
    return [
        HistoryRecord(r.request.prompt_id, step, r.request.uid, r.tokens, censored=r.finish == "length")
        for r in rollouts
    ]


def measure(
    arms: Arms, seeds: Sequence[int], num_visits: int, num_rounds: int
) -> dict[str, dict[str, list[list[Run]]]]:
    """Runs by epoch (`cold`, `warm`), arm, seed and round. A round before the first is run and thrown away: costs and
    acceptance have been measured before, as from the second step of a job on."""
    arms.round(arms.epoch(len(seeds) + 1000, num_visits))
    arms.compared = arms.different = 0
    out: dict[str, dict[str, list[list[Run]]]] = {"cold": defaultdict(list), "warm": defaultdict(list)}
    for seed in seeds:
        warm = arms.epoch(seed, num_visits)
        for kind, epoch in (("cold", Epoch(warm.batches, [])), ("warm", warm)):
            rounds = [arms.round(epoch, first) for first in range(num_rounds)]
            for name in arms.names:
                out[kind][name].append([runs[name] for runs in rounds])
    return out

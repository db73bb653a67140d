"""The rollout worker: one engine in one process, driven by the pool.

Invariants: a call returns every request it was given, as a rollout; a replay with drafting off leaves the drafter as
it was; the worker holds no state that a checkpoint would need besides the drafter's history.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from slipstream.drafter.base import Drafter, HistoryRecord
from slipstream.drafter.ngram import NgramDrafter
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.rollout.budget import BudgetPolicy, FixedBudget, OffBudget, TailBudget
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.model_loader import default_device, load_policy
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Everything a worker is built from: plain values, so that it travels to any node. Keys as in conf/schema.py."""

    model_path: str
    dtype: str
    random_init_seed: int | None
    num_gpus: float
    num_threads: int
    max_len: int
    max_live_requests: int
    max_forward_tokens: int
    kernels: Any
    drafter: str
    window_epochs: int
    min_match: int
    max_draft_tokens: int
    budget: str
    num_draft_tokens: int
    knee_tokens: float
    engine_extra_args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """What one call of `generate` did; seconds is the worker's wall time."""

    rollouts: list[Rollout]
    stats: EngineStats
    seconds: float


def make_drafter(spec: WorkerSpec) -> Drafter | None:
    """The drafter named by the spec."""
    if spec.drafter == "suffix":
        return SuffixDrafter(spec.window_epochs, spec.min_match)
    return NgramDrafter(spec.min_match) if spec.drafter == "ngram" else None


def make_budget(spec: WorkerSpec) -> BudgetPolicy | None:
    """The budget policy named by the spec; None without a drafter."""
    if spec.drafter == "off":
        return None
    if spec.budget == "fixed":
        return FixedBudget(spec.num_draft_tokens)
    return TailBudget(spec.knee_tokens, spec.max_draft_tokens) if spec.budget == "tail" else OffBudget()


class RolloutWorker:
    """One engine with its drafter. Made a Ray actor by the pool, usable as a plain object."""

    def __init__(self, spec: WorkerSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        model = load_policy(spec.model_path, spec.dtype, default_device(spec.num_gpus), spec.random_init_seed)
        context = int(model.config.get_text_config().max_position_embeddings)
        self._drafter, self._budget = make_drafter(spec), make_budget(spec)
        self._engine = TorchEngine(
            model,
            max_live_requests=spec.max_live_requests,
            max_len=min(spec.max_len, context),
            max_forward_tokens=spec.max_forward_tokens,
            drafter=self._drafter,
            budget=self._budget,
            max_draft_tokens=spec.max_draft_tokens,
            kernels=spec.kernels,
            **spec.engine_extra_args,
        )

    def ready(self) -> dict[str, Any]:
        """Answers once the model is loaded: which kernels, why, on which device, and the context length."""
        engine = self._engine
        return {
            "kernels": engine.kernels.name,
            "reason": engine.kernels.reason,
            "device": str(engine.device),
            "max_len": engine.max_len,
        }

    def generate(self, requests: list[Request], speculate: bool, timeout_s: float) -> GenerateResult:
        """Runs the requests to their end. speculate=False replays without drafting and without learning."""
        engine = self._engine
        engine.drafter, engine.budget = (self._drafter, self._budget) if speculate else (None, None)
        engine.stats(reset=True)
        started = time.perf_counter()
        engine.submit(requests)
        rollouts = engine.drain(timeout_s)
        return GenerateResult(rollouts, engine.stats(reset=True), time.perf_counter() - started)

    def update_policy(self, weights: Mapping[str, torch.Tensor], version: int) -> int:
        """Replaces the policy in place; returns the version now served."""
        self._engine.update_policy(weights, version)
        return self._engine.policy_version

    def publish(self, step: int, records: list[HistoryRecord]) -> None:
        """Step boundary: the drafter's window rolls."""
        if self._drafter is not None:
            self._drafter.publish(step, records)

"""The rollout worker: one engine in one process, driven by the pool.

Invariants: a call returns every request it was given, as a rollout; a replay with drafting off leaves the drafter as
it was; the worker holds no state that a checkpoint would need besides the drafter's history.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slipstream.drafter.base import Drafter, HistoryRecord
from slipstream.drafter.ngram import NgramDrafter
from slipstream.drafter.shared_folder import SharedFolder, make_folder
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.budget import BudgetPolicy, FixedBudget, OffBudget, TailBudget
from slipstream.rollout.engine import EngineStats
from slipstream.rollout.model_loader import default_device, load_policy
from slipstream.rollout.stacks import thread_stacks
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
    cuda_graphs: bool
    compile: bool
    batch_invariant: bool
    drafter: str
    window_epochs: int
    min_match: int
    drafter_args: Mapping[str, Any]
    max_draft_tokens: int
    budget: str
    num_draft_tokens: int
    knee_tokens: float
    engine_extra_args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """What one call of `generate` did. seconds: the worker's wall time; acceptance: what it observed of its drafts."""

    rollouts: list[Rollout]
    stats: EngineStats
    seconds: float
    acceptance: AcceptanceModel


def make_drafter(spec: WorkerSpec) -> Drafter | None:
    """The drafter named by the spec."""
    if spec.drafter == "suffix":
        return SuffixDrafter(spec.window_epochs, spec.min_match, **spec.drafter_args)
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
            cuda_graphs=spec.cuda_graphs,
            compile=spec.compile,
            batch_invariant=spec.batch_invariant,
            **spec.engine_extra_args,
        )
        self._folder: Path | None = None
        self._acceptance_before = self._engine.acceptance.copy()

    def ready(self) -> dict[str, Any]:
        """Answers once the model is loaded: which kernels, why, how steps run, device and context length."""
        engine = self._engine
        return {
            "kernels": engine.kernels.name,
            "reason": engine.kernels.reason,
            "steps": engine.runner_reason,
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
        seconds = time.perf_counter() - started
        observed = engine.acceptance.minus(self._acceptance_before)
        self._acceptance_before = engine.acceptance.copy()
        return GenerateResult(rollouts, engine.stats(reset=True), seconds, observed)

    def update_policy(self, weights: Mapping[str, torch.Tensor], version: int) -> int:
        """Replaces the policy in place; returns the version now served."""
        self._engine.update_policy(weights, version)
        return self._engine.policy_version

    def publish(self, step: int, records: list[HistoryRecord], acceptance: AcceptanceModel | None) -> None:
        """Step boundary: the drafter's window rolls. acceptance: what all workers together observed so far."""
        if self._drafter is None:
            return
        self._drafter.publish(step, records)
        if acceptance is not None:
            # What comes out of the object store is read-only.
            self._engine.learn_acceptance(acceptance.copy())
            self._acceptance_before = acceptance

    def node_id(self) -> str:
        """The Ray node that this actor runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def stacks(self) -> str:
        """Where every thread of this process is, innermost call last."""
        return thread_stacks()

    def close(self) -> None:
        """Removes what this worker has put into shared memory."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def open_shared_folder(self) -> str | None:
        """Makes this worker the builder of its node; the folder, or None if its drafter has nothing to share."""
        if not isinstance(self._drafter, SuffixDrafter) or self._drafter.index_name != "native":
            return None
        self._folder = folder = make_folder()
        self._drafter.share(SharedFolder(folder, "builder"))
        return str(folder)

    def join_shared_folder(self, path: str) -> None:
        """Maps from now on what the node's builder builds."""
        if isinstance(self._drafter, SuffixDrafter):
            self._drafter.share(SharedFolder(Path(path), "reader"))

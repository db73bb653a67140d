"""The rollout worker: one engine in one process.

Invariants: a replay with drafting off leaves the drafter as it was; the worker holds no state that a checkpoint would
need besides the drafter's history, and none that a new worker could not be told.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slipstream.drafter.base import Drafter, HistoryRecord
from slipstream.drafter.ngram import NgramDrafter
from slipstream.drafter.shared_folder import SharedFolder, make_folder
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.rollout.budget import BudgetPolicy, FixedBudget, OffBudget, PriceBudget
from slipstream.rollout.class_budget import ClassBudget
from slipstream.rollout.closed_form import ClosedFormBudget
from slipstream.rollout.cost_model import CostModel
from slipstream.rollout.guard import Guard, GuardState
from slipstream.rollout.learned import Learned, Observed, observe_records
from slipstream.rollout.model_loader import default_device, load_policy
from slipstream.rollout.pricing import Pricing
from slipstream.rollout.stacks import thread_stacks
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.weight_handle import Share, WeightHandle
from slipstream.rollout.weight_receiver import Receipt, WeightReceiver


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
    cpu_products: Any
    cuda_graphs: bool
    compile: bool
    batch_invariant: bool
    drafter: str
    window_epochs: int
    min_match: int
    drafter_args: Mapping[str, Any]
    max_draft_tokens: int
    budget: str
    budget_args: Mapping[str, Any]
    engine_extra_args: Mapping[str, Any]


def make_drafter(spec: WorkerSpec) -> Drafter | None:
    """The drafter named by the spec."""
    if spec.drafter == "suffix":
        return SuffixDrafter(spec.window_epochs, spec.min_match, **spec.drafter_args)
    return NgramDrafter(spec.min_match) if spec.drafter == "ngram" else None


def make_budget(spec: WorkerSpec) -> BudgetPolicy | None:
    """The budget policy named by the spec; None without a drafter."""
    if spec.drafter == "off":
        return None
    args, widths = spec.budget_args, spec.budget_args["draft_widths"]
    if spec.budget == "fixed":
        return FixedBudget(args["num_draft_tokens"])
    if spec.budget == "class":
        return ClassBudget(args["class_draft_tokens"], widths)
    if spec.budget == "closed_form":
        return ClosedFormBudget(spec.max_draft_tokens, args["formula"], widths)
    if spec.budget == "price":
        return PriceBudget(spec.max_draft_tokens, spec.drafter != "ngram", widths, args["branching"])
    return OffBudget()


def make_pricing(spec: WorkerSpec) -> Pricing:
    """What the budget is shown, with nothing observed yet."""
    args = spec.budget_args
    cost = CostModel(args["knee_tokens"], args["forward_buckets"])
    return Pricing(spec.max_live_requests, cost, guard=Guard() if args["guard"] else None)


class RolloutWorker:
    """One engine with its drafter, a plain object; rollout.streaming_worker makes it what the pools drive."""

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
            cpu_products=spec.cpu_products,
            cuda_graphs=spec.cuda_graphs,
            compile=spec.compile,
            batch_invariant=spec.batch_invariant,
            pricing=make_pricing(spec),
            **spec.engine_extra_args,
        )
        self._receiver = WeightReceiver(self._engine, self.node_id, spec.num_threads)
        self._folder: Path | None = None
        self._acceptance_before = self._engine.acceptance.copy()
        self._cost_before = self._engine.pricing.cost.copy()

    def ready(self) -> dict[str, Any]:
        """Answers once the model is loaded: which kernels, why, how steps run, device and context length."""
        engine = self._engine
        return {
            "kernels": engine.kernels.name,
            "products": engine.kernels.products,
            "reason": engine.kernels.reason,
            "steps": engine.runner_reason,
            "device": str(engine.device),
            "max_len": engine.max_len,
        }

    def speculate(self, wanted: bool) -> None:
        """Drafting on or off, for requests that come from now on."""
        self._engine.drafter, self._engine.budget = (self._drafter, self._budget) if wanted else (None, None)

    def observed(self) -> Observed:
        """What the engine observed since the last call."""
        engine, pricing = self._engine, self._engine.pricing
        acceptance = engine.acceptance.minus(self._acceptance_before)
        cost = pricing.cost.minus(self._cost_before)
        self._acceptance_before, self._cost_before = engine.acceptance.copy(), pricing.cost.copy()
        guard = None if pricing.guard is None else pricing.guard.state()
        return Observed(acceptance, cost, pricing.metrics(), guard)

    def prepare_policy(self, handle: WeightHandle, share: Share, timeout_s: float) -> Receipt:
        """Fetches weights and verifies a share of them, beside whatever the engine does; serves what it served. share:
        which one of how many workers of its node this is."""
        return self._receiver.prepare(handle, share, timeout_s)

    def publish(
        self, step: int, records: list[HistoryRecord], learned: Learned | None, guard: GuardState | None = None
    ) -> None:
        """Step boundary: the drafter's window rolls. learned: what all workers together observed so far; its lengths,
        where it has any, hold those of the records already. guard: what this worker's guard goes on from."""
        if self._drafter is None:
            return
        self._drafter.publish(step, records)
        pricing = self._engine.pricing
        if learned is not None:
            # What comes out of the object store is read-only.
            self._engine.learn_acceptance(learned.acceptance.copy())
            self._acceptance_before = learned.acceptance
            pricing.cost.replace(learned.cost)
            self._cost_before = pricing.cost.copy()
        if guard is not None and pricing.guard is not None:
            pricing.guard.restore(guard)
        lengths = learned.lengths if learned is not None else None
        if lengths is None:
            lengths = pricing.lengths
            observe_records(lengths, records)
        pricing.learn_lengths(lengths)

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

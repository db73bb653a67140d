"""What a job would do, worked out before anything starts: `slipstream train --dry-run`.

Invariants: nothing is started, written or downloaded, and neither torch nor ray is imported; every number
is either computed from the settings and the files they name, or said to be unknown. Memory is an estimate
from shapes: activations and the runtime's own memory come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slipstream.conf.cluster_config import ClusterConfig
from slipstream.conf.learning import AlgoConfig
from slipstream.conf.schema import DataConfig, Settings
from slipstream.trainer.config import model_folder
from slipstream.trainer.errors import ConfigError
from slipstream.trainer.model_shape import ModelShape, read_model_shape
from slipstream.trainer.plan_warnings import find_warnings

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MOMENT_BYTES = 8
"""Bytes per parameter of AdamW's two moments in float32 (Loshchilov and Hutter, arXiv 1711.05101)."""


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """A group of equal Ray actors; cpus, gpus and threads are those of one."""

    name: str
    count: int
    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The arithmetic of a job. num_train_prompts is None when it is only known after a download."""

    prompts_per_step: int
    samples_per_prompt: int
    updates_per_step: int
    num_steps: int
    num_train_prompts: int | None

    @property
    def samples_per_step(self) -> int:
        """Responses sampled and trained on in one step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def samples_per_update(self) -> int:
        """Responses in one optimiser update."""
        return self.samples_per_step // self.updates_per_step

    @property
    def epochs(self) -> float | None:
        """How often the job sees each training prompt, on average."""
        return self.prompts_per_step * self.num_steps / self.num_train_prompts if self.num_train_prompts else None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one worker and one learner. A worker holds weights and KV cache; the learners share weights, gradients,
    moments and reference out among them, and gather a layer at a time."""

    num_parameters: int
    worker_weights: int
    worker_kv_cache: int
    learner: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `format_plan` prints. memory is None when the model's files are not on this machine."""

    settings: Settings
    actors: tuple[ActorPlan, ...]
    batch: BatchPlan
    memory: MemoryPlan | None
    from_hub: bool
    run_dir: Path
    warnings: tuple[str, ...]


def make_plan(settings: Settings) -> Plan:
    """Works the plan out; reads at most the model's config and tensor headers and the parquet footer."""
    folder = model_folder(settings.model.path)
    shape = read_model_shape(folder) if folder else None
    actors, batch = _actors(settings.cluster), _batch(settings)
    name = settings.run.name or f"{settings.experiment_name}-YYYYmmdd-HHMMSS"
    return Plan(
        settings=settings,
        actors=actors,
        batch=batch,
        memory=_memory(settings, shape) if shape else None,
        from_hub=folder is None,
        run_dir=Path(settings.run.dir) / name,
        warnings=tuple(find_warnings(settings, batch.num_train_prompts, shape.max_positions if shape else None)),
    )


def format_plan(plan: Plan) -> str:
    """The plan as text for a terminal, a titled block per subject."""
    blocks = [
        (f"plan of {plan.settings.experiment_name}", _model_lines(plan)),
        ("actors", _actor_lines(plan)),
        ("batch", _batch_lines(plan.batch, plan.settings.algo)),
        ("memory (estimate)", _memory_lines(plan)),
        ("speculation", _speculation_lines(plan.settings)),
        ("output", _output_lines(plan)),
        ("warnings", [f"  ! {text}" for text in plan.warnings]),
    ]
    return "\n\n".join("\n".join([title, *lines]) for title, lines in blocks if lines)


def _actors(cluster: ClusterConfig) -> tuple[ActorPlan, ...]:
    return (
        ActorPlan(
            "rollout worker",
            cluster.num_workers,
            cluster.cpus_per_worker,
            cluster.gpus_per_worker,
            cluster.threads_per_worker,
        ),
        ActorPlan(
            "learner",
            cluster.num_learners,
            cluster.cpus_for_learner,
            cluster.gpus_for_learner,
            cluster.threads_for_learner,
        ),
    )


def _batch(settings: Settings) -> BatchPlan:
    algo = settings.algo
    return BatchPlan(
        prompts_per_step=algo.num_prompts_per_step,
        samples_per_prompt=settings.sampling.num_samples_per_prompt,
        updates_per_step=algo.num_updates_per_step,
        num_steps=algo.num_steps,
        num_train_prompts=_count_prompts(settings.data),
    )


def _count_prompts(data: DataConfig) -> int | None:
    """Rows of the training set; too long prompts are only found, and left out, by the job itself."""
    if data.source == "task":
        return data.task.num_train
    path = Path(data.train_path or "")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return None
    import pyarrow
    import pyarrow.parquet

    try:
        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"data.train_path={path}: {str(error).splitlines()[0]}; allowed: parquet files") from None


def _memory(settings: Settings, shape: ModelShape) -> MemoryPlan:
    width = DTYPE_BYTES[settings.model.dtype]
    weights = shape.num_parameters * width
    trained = shape.num_parameters * DTYPE_BYTES["float32"] if settings.learner.master_weights_float32 else weights
    reference = trained if settings.algo.kl_coef > 0 else 0
    slots = settings.engine.max_live_requests * _max_length(settings)
    return MemoryPlan(
        num_parameters=shape.num_parameters,
        worker_weights=weights,
        worker_kv_cache=slots * shape.kv_values_per_token * width,
        learner=-(-(2 * trained + shape.num_parameters * MOMENT_BYTES + reference) // settings.cluster.num_learners),
    )


def _max_length(settings: Settings) -> int:
    return settings.data.max_prompt_tokens + settings.sampling.max_new_tokens


def _model_lines(plan: Plan) -> list[str]:
    model = plan.settings.model
    weights = "seeded random weights" if model.random_init else "trained weights"
    size = f", {plan.memory.num_parameters:,} parameters" if plan.memory else ""
    data = plan.settings.data
    source = f"task {data.task.name}" if data.source == "task" else str(data.train_path)
    place = " from the Hugging Face hub" if plan.from_hub else ""
    return [f"  model    {model.path}{place}, {model.dtype}, {weights}{size}", f"  prompts  {source}"]


def _actor_lines(plan: Plan) -> list[str]:
    cluster = plan.settings.cluster
    where = "a local Ray of its own" if cluster.address is None else f"the Ray at {cluster.address}"
    rows = [f"  {a.count} x {a.name:<14}  CPUs {a.cpus:g}, GPUs {a.gpus:g}, threads {a.threads}" for a in plan.actors]
    return [*rows, f"  on {where}; all must be ready within {cluster.start_timeout_s:g} s"]


def _batch_lines(batch: BatchPlan, algo: AlgoConfig) -> list[str]:
    group = f"{batch.prompts_per_step} prompts x {batch.samples_per_prompt} samples"
    step = f"{group} = {batch.samples_per_step} samples"
    updates = f"{batch.updates_per_step} of {batch.samples_per_update} samples each"
    prompts, samples = batch.prompts_per_step * batch.num_steps, batch.samples_per_step * batch.num_steps
    total = f"{batch.num_steps} steps = {prompts:,} prompts = {samples:,} samples"
    known = batch.num_train_prompts
    passes = f"{batch.epochs:.2f} over {known:,} training prompts" if known else "unknown before the data is loaded"
    lines = [f"  step     {step}", f"  updates  {updates}", f"  total    {total}", f"  epochs   {passes}"]
    return [*lines, f"  ahead    {_ahead(algo)}"]


def _ahead(algo: AlgoConfig) -> str:
    groups = algo.num_prompts_per_step * (algo.max_staleness_steps + 1) + algo.num_extra_groups
    if not algo.max_staleness_steps:
        return "no: sampling and learning take turns"
    return f"at most {algo.max_staleness_steps} updates, {groups} groups started or in training ({algo.in_flight})"


def _memory_lines(plan: Plan) -> list[str]:
    memory, settings = plan.memory, plan.settings
    if memory is None:
        return ["  unknown: the model's files are not on this machine, or its layout is not a usual one"]
    slots = f"{settings.engine.max_live_requests} requests x {_max_length(settings):,} tokens"
    shared = f" each, shared out over {settings.cluster.num_learners}" if settings.cluster.num_learners > 1 else ""
    cache = f"{_size(memory.worker_kv_cache)} KV cache: {slots}"
    return [
        f"  worker   {_size(memory.worker_weights)} weights, {cache}",
        f"  learner  {_size(memory.learner)} weights, gradients and optimiser{shared}",
    ]


def _speculation_lines(settings: Settings) -> list[str]:
    drafter, budget, steps = settings.drafter, settings.budget, settings.proof.steps(settings.algo.num_steps)
    draft = f"{drafter.name}, at most {drafter.max_draft_tokens} tokens per request and forward pass"
    shares = {
        "off": "off: nothing is drafted",
        "fixed": f"fixed, {budget.num_draft_tokens} tokens for every request",
        "class": "class: {} tokens for short, {} for medium and {} for long requests".format(
            *budget.class_draft_tokens
        ),
        "closed_form": f"closed_form, {budget.formula}: {budget.knee_tokens:g} tokens cost a pass until it is measured",
        "price": f"price: {budget.knee_tokens:g} tokens cost as much as a pass until it is measured",
    }
    named = ", ".join(str(step) for step in steps[:6]) + (", ..." if len(steps) > 6 else "")
    proof = f"{len(steps)} steps replayed with drafting off: {named}" if steps else "no replays"
    return [
        f"  drafter  {'off' if drafter.name == 'off' else draft}",
        f"  budget   {shares[budget.name]}",
        f"  proof    {proof}",
    ]


def _output_lines(plan: Plan) -> list[str]:
    tracking, save = plan.settings.tracking, plan.settings.checkpoint
    often = f"every {save.every_steps} steps and at the end" if save.every_steps else "at the end"
    return [
        f"  run      {plan.run_dir}: settings.json, metrics.jsonl, rollouts.jsonl, report.html",
        f"  save     {plan.run_dir / 'checkpoints'}, {often}, the last {save.keep_last} kept",
        f"  wandb    {tracking.mode}, project {tracking.project}",
    ]


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"

"""The strict schema of a job and the one place of its defaults.

Invariants: no torch, no ray, no file is opened here (paths are checked by trainer.config once the command
knows it will run); every key is listed here or in one of the files imported here, or the job is refused
(`extra="forbid"`); units are in the names. The only free-form place is `engine.extra_args`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slipstream.conf.base import (
    FolderName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Strict,
)
from slipstream.conf.cluster_config import ClusterConfig
from slipstream.conf.learning import AlgoConfig, LearnerConfig
from slipstream.conf.weights import WeightsConfig


class RunConfig(Strict):
    """Where a job writes, and what it is called."""

    name: FolderName | None = Field(
        None, description="Folder name under run.dir; null makes one from experiment and time."
    )
    dir: str = Field("runs", description="Parent folder of all run folders.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds request uids, sampling noise and data order.")
    exist: Literal["fail", "resume", "replace"] = Field(
        "fail", description="What to do when the run folder exists; --resume is `resume`."
    )


class ModelConfig(Strict):
    """The policy."""

    path: str = Field(
        "builtin:chain_sum",
        description="Local folder, hub id, or builtin:chain_sum, the small policy shipped with the package.",
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    random_init: bool = Field(False, description="Take only the architecture from model.path; seeded random weights.")


class TaskConfig(Strict):
    """The built-in generated task (data.source=task)."""

    name: Literal["chain_sum"] = "chain_sum"
    num_train: PositiveInt = 64
    num_validation: PositiveInt = 64
    min_level: int = Field(1, ge=1, le=6)
    max_level: int = Field(6, ge=1, le=6)
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _levels(self) -> TaskConfig:
        if self.min_level > self.max_level:
            raise ValueError(f"data.task.min_level={self.min_level} is above data.task.max_level={self.max_level}")
        return self


class DataConfig(Strict):
    """Prompts: verl-format parquet from a path or hub id, or the built-in task in the same format."""

    source: Literal["task", "parquet"] = "task"
    task: TaskConfig = TaskConfig()
    train_path: str | None = Field(None, description="Parquet file, folder of parquet files, or hub data set id.")
    validation_path: str | None = None
    prompt_key: str = Field("prompt", description="Column with the list of {role, content} messages.")
    max_prompt_tokens: PositiveInt = Field(512, description="Longer prompts are counted, logged and left out.")
    shuffle: bool = True


class RewardConfig(Strict):
    """How a response becomes a number."""

    rule: Literal["auto", "math", "exact", "custom"] = Field(
        "auto", description="auto: by data_source and reward_model.style; custom: reward.function."
    )
    function: str | None = Field(None, description="Dotted path `package.module.function` (rule=custom).")
    timeout_s: PositiveFloat = Field(10.0, description="Deadline for scoring one response.")
    max_retries: NonNegativeInt = Field(
        1, description="A response whose scoring hung or died is scored again this many times, in a fresh process."
    )


class SamplingConfig(Strict):
    """How the policy is sampled in training rollouts."""

    num_samples_per_prompt: PositiveInt = 8
    max_new_tokens: PositiveInt = 512
    temperature: float = Field(1.0, ge=0, le=5)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: NonNegativeInt = 0


class EngineConfig(Strict):
    """The rollout engine of each worker."""

    name: Literal["torch"] = "torch"
    max_live_requests: PositiveInt = Field(64, description="Slots of the KV cache: requests decoded together.")
    max_forward_tokens: PositiveInt = Field(512, description="Tokens in one forward pass, prefill chunks included.")
    kernels: Literal["auto", "native", "triton", "reference"] = Field(
        "auto", description="auto: triton on a GPU, native on the CPU in float32; reference: the plain twins."
    )
    cpu_products: Literal["auto", "fma", "tiles"] = Field(
        "auto",
        description="Linear layers of the native kernels. fma: float32 multiply-adds. tiles: bfloat16 tiles, float32 "
        "factors as sums of two, with AMX where the CPU has it. auto: tiles with AMX, else fma; all workers the same.",
    )
    cuda_graphs: bool = Field(True, description="Replay decoding passes as CUDA graphs; without effect on the CPU.")
    compile: bool = Field(False, description="torch.compile the model's layers.")
    batch_invariant: bool = Field(
        False, description="No reduction depends on batch or draft width: same bits also in bfloat16, at some speed."
    )
    extra_args: dict[str, Any] = Field(default_factory=dict, description="Passed to the engine as they are.")


class DrafterConfig(Strict):
    """Who proposes draft tokens."""

    name: Literal["off", "suffix", "ngram"] = "suffix"
    window_epochs: PositiveInt = Field(16, description="Rollouts of a prompt older than this many of its visits fade.")
    min_match: PositiveInt = Field(1, description="Shortest context suffix worth continuing.")
    max_draft_tokens: PositiveInt = Field(32, description="Widest draft of one request in one step.")
    index: Literal["auto", "native", "reference"] = Field(
        "auto", description="suffix: auto takes the native index where it is built; reference: plain Python."
    )
    decay: float = Field(0.95, gt=0, le=1, description="suffix: weight of a visit relative to the next newer one.")
    escape: NonNegativeFloat = Field(0.5, description="suffix: weight, in newest occurrences, of what was never seen.")
    max_index_tokens: PositiveInt = Field(
        64_000_000, description="suffix: tokens indexed over all prompts; the least recently used go first."
    )
    shared_tokens: NonNegativeInt = Field(
        4_000_000, description="suffix: newest tokens of all prompts, for prompts that know little; 0: none."
    )
    index_threads: PositiveInt = Field(
        1, description="suffix: threads of the native index in batches of 1,024 and more."
    )
    share_index: bool = Field(True, description="suffix: one worker of a node builds the index, the others map it.")


class BudgetConfig(Strict):
    """How many draft tokens each live request gets."""

    name: Literal["off", "fixed", "class", "closed_form", "price"] = "price"
    num_draft_tokens: NonNegativeInt = Field(8, description="fixed: draft tokens of every request.")
    class_draft_tokens: Annotated[list[NonNegativeInt], Field(min_length=3, max_length=3)] = Field(
        [0, 8, 24], description="class: draft tokens of short, medium and long requests."
    )
    formula: Literal["published", "corrected"] = Field(
        "corrected", description="closed_form: Eq 7 and 9 of DAS as printed, or with their algebra put right."
    )
    knee_tokens: PositiveFloat = Field(
        32.0,
        description="Tokens that cost as much as a pass itself, until enough steps are measured; about 300 for a 7B "
        "on an H100.",
    )
    draft_widths: list[PositiveInt] = Field(
        default_factory=list, description="Draft widths that the engine can run, besides 0; empty: any."
    )
    forward_buckets: list[PositiveInt] = Field(
        default_factory=list, description="Sizes that the engine rounds the tokens of a pass up to; empty: none."
    )
    branching: PositiveInt = Field(
        1, description="price: continuations of a draft token that may be verified side by side; 1: chains only."
    )
    guard: bool = Field(True, description="Measure the gain with some steps held out; drafting that loses stops.")


class TrackingConfig(Strict):
    """Console and JSONL are always on; this is about Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "slipstream"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = Field(default_factory=list)


class EvaluationConfig(Strict):
    """The validation prompts through the same workers, in between."""

    every_steps: NonNegativeInt = Field(0, description="0: never; n: with the weights of every n-th step.")
    at_start: bool = Field(False, description="Also with the initial policy (needs every_steps above 0).")
    num_samples_per_prompt: PositiveInt = Field(1, description="Above 1: best@k and maj@k as well.")
    temperature: float = Field(0.0, ge=0, le=5, description="0: greedy.")
    max_prompts: PositiveInt | None = Field(None, description="The first so many validation prompts; null: all.")


class WatchdogConfig(Strict):
    """Ends a job that does not get on, and writes down where everybody is."""

    timeout_s: NonNegativeFloat = Field(
        3600.0, description="Seconds without a finished rollout, update or step; 0 turns the watchdog off."
    )


class CheckpointConfig(Strict):
    """What survives a crash."""

    every_steps: NonNegativeInt = Field(10, description="0: only at the end.")
    keep_last: PositiveInt = Field(2, description="The newest so many stay.")
    keep_best: NonNegativeInt = Field(0, description="So many with the best checkpoint.best_metric stay as well.")
    best_metric: str = Field(
        "critic/rewards/mean",
        description="A name in metrics.jsonl; a step without it (between two evaluations) is no candidate.",
    )
    best_mode: Literal["max", "min"] = Field("max", description="Whether the best value is the highest or the lowest.")
    asynchronous: bool = Field(
        True, description="Write while training goes on, from a copy of the learner's state in host memory."
    )
    timeout_s: PositiveFloat = Field(
        600.0, description="Deadline for writing one checkpoint; Ctrl-C waits as long for one under way."
    )


class ProofConfig(Strict):
    """Replays of a step's requests with drafting off, before the weights move: same tokens, other time."""

    every_steps: NonNegativeInt = Field(0, description="0: never; n: every n-th step from proof.first_step on.")
    first_step: PositiveInt = 1

    def steps(self, num_steps: int) -> range:
        """The steps, counted from 1, that a job of `num_steps` steps replays."""
        return range(self.first_step, num_steps + 1, self.every_steps) if self.every_steps else range(0)


class Settings(Strict):
    """A whole job."""

    experiment_name: FolderName = Field("custom", description="Set by the experiment group; used in names and reports.")
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    algo: AlgoConfig = AlgoConfig()
    learner: LearnerConfig = LearnerConfig()
    engine: EngineConfig = EngineConfig()
    drafter: DrafterConfig = DrafterConfig()
    budget: BudgetConfig = BudgetConfig()
    cluster: ClusterConfig = ClusterConfig()
    weights: WeightsConfig = WeightsConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    proof: ProofConfig = ProofConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> Settings:
        if self.data.source == "parquet" and not self.data.train_path:
            raise ValueError("data.train_path is null; data.source=parquet needs a parquet path or a hub data set id")
        if self.data.source == "task" and (self.data.train_path or self.data.validation_path):
            raise ValueError(
                f"data.train_path={self.data.train_path}, data.validation_path={self.data.validation_path}; "
                "data.source=task generates its prompts; to read files choose data=parquet"
            )
        if self.reward.rule == "custom" and not self.reward.function:
            raise ValueError("reward.function is null; reward.rule=custom needs a dotted path")
        if self.reward.rule != "custom" and self.reward.function:
            raise ValueError(
                f"reward.function={self.reward.function} and reward.rule={self.reward.rule}; "
                "a function of your own needs reward.rule=custom"
            )
        if self.evaluation.every_steps and self.data.source == "parquet" and not self.data.validation_path:
            raise ValueError(
                f"evaluation.every_steps={self.evaluation.every_steps} and data.validation_path is null; "
                "an evaluation needs validation prompts"
            )
        if self.evaluation.at_start and not self.evaluation.every_steps:
            raise ValueError(
                "evaluation.at_start=true and evaluation.every_steps=0; allowed: every_steps of at least 1"
            )
        if self.sampling.num_samples_per_prompt < 2:
            raise ValueError("sampling.num_samples_per_prompt=1; an advantage over the group needs at least 2")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0; greedy samples of a group are all equal and carry no advantage")
        if self.sampling.top_p < 1 or self.sampling.top_k > 0:
            raise ValueError(
                f"sampling.top_p={self.sampling.top_p}, sampling.top_k={self.sampling.top_k}; training needs "
                "top_p=1 and top_k=0, because the loss compares log-probabilities of the whole distribution"
            )
        if self.engine.max_forward_tokens < self.engine.max_live_requests:
            raise ValueError(
                f"engine.max_forward_tokens={self.engine.max_forward_tokens} is below "
                f"engine.max_live_requests={self.engine.max_live_requests}; every live request needs a "
                "token in each forward pass"
            )
        samples = self.algo.num_prompts_per_step * self.sampling.num_samples_per_prompt
        if samples % self.algo.num_updates_per_step:
            raise ValueError(
                f"algo.num_updates_per_step={self.algo.num_updates_per_step} does not divide the {samples} "
                "samples of a step (algo.num_prompts_per_step x sampling.num_samples_per_prompt)"
            )
        return self

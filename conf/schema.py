"""The strict schema of a job and the one place of its defaults.

Invariants: no torch, no ray, no file is opened here (paths are checked by trainer.config once the command
knows it will run); every key is listed here or the job is refused (`extra="forbid"`); units are in the
names. The only free-form place is `engine.extra_args`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Strict(BaseModel):
    """Refuses unknown keys, non-finite numbers and silent conversions; immutable once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True, validate_default=True)


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


class CorrectionConfig(Strict):
    """What is done about samples that an older policy, or another program, drew; see trainer/correction.py.

    `auto` follows algo.max_staleness_steps: off at 0; above 0 the learner's own log-probabilities and token weights.
    """

    proximal: Literal["auto", "rollout", "learner"] = Field(
        "auto",
        description="What the clip compares with: the rollouts' log-probabilities, or the learner's (decoupled).",
    )
    weights: Literal["auto", "off", "token", "sequence", "icepop"] = Field(
        "auto", description="Importance weights of the samples; token: truncated importance sampling."
    )
    weight_low: PositiveFloat = Field(0.5, description="icepop: a token whose ratio is lower is masked.")
    weight_high: PositiveFloat = Field(2.0, description="Highest weight; icepop masks what is above.")
    rejection: Literal["off", "token", "sequence", "sequence_mean"] = Field(
        "off", description="Leaves out the tokens, or the whole responses, whose ratio is out of bounds."
    )
    rejection_low: PositiveFloat = 0.5
    rejection_high: PositiveFloat = 2.0

    @model_validator(mode="after")
    def _bounds(self) -> CorrectionConfig:
        for name in ("weight", "rejection"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low > high:
                raise ValueError(
                    f"algo.correction.{name}_low={low} is above algo.correction.{name}_high={high}; "
                    "allowed: at most that"
                )
        if self.proximal == "rollout" and (self.weights not in ("auto", "off") or self.rejection != "off"):
            raise ValueError(
                f"algo.correction.proximal=rollout with algo.correction.weights={self.weights} and "
                f"algo.correction.rejection={self.rejection}; both need algo.correction.proximal=learner"
            )
        return self


class AlgoConfig(Strict):
    """Advantage, loss and optimiser. Counts of prompts are prompts, counts of samples are samples."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"] = Field(
        "grpo", description="How a sample is compared with its group; see trainer/advantages.py."
    )
    loss: Literal["ppo_clip", "gspo", "cispo"] = Field("ppo_clip", description="See trainer/losses.py.")
    num_steps: PositiveInt = 32
    num_prompts_per_step: PositiveInt = 16
    num_updates_per_step: PositiveInt = Field(1, description="Optimiser updates each step's samples are split into.")
    clip_ratio_low: Share = 0.2
    clip_ratio_high: float = Field(0.28, ge=0, le=10, description="Clip-higher (DAPO); equal to low for plain PPO.")
    dual_clip: float = Field(
        10.0, gt=1, description="ppo_clip: a negative advantage costs at most this many times its size, as in verl."
    )
    loss_agg: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = Field(
        "token-mean", description="seq-mean-token-sum-norm divides by sampling.max_new_tokens (Dr. GRPO)."
    )
    max_staleness_steps: NonNegativeInt = Field(
        0, description="Updates a rollout's oldest policy may lag behind; 0: sampling and learning take turns."
    )
    in_flight: Literal["continue", "recompute", "drain"] = Field(
        "continue",
        description="Unfinished rollouts when the weights change: keep their cache, recompute it, finish them first.",
    )
    num_extra_groups: NonNegativeInt = Field(
        0, description="Groups started beyond what a step needs; the least finished are closed early, and counted."
    )
    filter_uniform_groups: bool = Field(
        False, description="Replace groups whose rewards are all equal (DAPO's dynamic sampling), and count them."
    )
    max_refill_rounds: PositiveInt = Field(
        4, description="A step replaces at most this many times its own number of groups; then they are kept."
    )
    correction: CorrectionConfig = CorrectionConfig()
    kl_coef: NonNegativeFloat = Field(0.0, description="Weight of the KL to the initial policy; 0 holds no reference.")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.95
    grad_clip_norm: PositiveFloat = 1.0
    max_tokens_per_microbatch: PositiveInt = Field(8192, description="Padded tokens of one forward-backward pass.")

    @property
    def streams(self) -> bool:
        """Whether rollouts are collected one by one, as they finish, instead of step by step."""
        return self.max_staleness_steps > 0 or self.num_extra_groups > 0 or self.filter_uniform_groups

    @property
    def weights(self) -> Literal["off", "token", "sequence", "icepop"]:
        """algo.correction.weights with `auto` resolved."""
        if self.correction.weights != "auto":
            return self.correction.weights
        return "token" if self.max_staleness_steps and self.correction.proximal != "rollout" else "off"

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether the learner recomputes the samples' log-probabilities before its first update of a step."""
        if self.correction.proximal != "auto":
            return self.correction.proximal == "learner"
        return self.max_staleness_steps > 0 or self.weights != "off" or self.correction.rejection != "off"


class EngineConfig(Strict):
    """The rollout engine of each worker."""

    name: Literal["torch"] = "torch"
    max_live_requests: PositiveInt = Field(64, description="Slots of the KV cache: requests decoded together.")
    max_forward_tokens: PositiveInt = Field(512, description="Tokens in one forward pass, prefill chunks included.")
    kernels: Literal["auto", "native", "triton", "reference"] = Field(
        "auto", description="auto: triton on a GPU, native on the CPU in float32; reference: the plain twins."
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
    index_threads: PositiveInt = Field(1, description="suffix: threads of the native index in batches of 512 and more.")
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
    guard: bool = Field(True, description="Measure the gain with some steps held out; drafting that loses stops.")


class ClusterConfig(Strict):
    """Ray: a local one of our own, or an existing one by address."""

    address: str | None = Field(None, description="null starts a local Ray; `auto` or host:port joins a running one.")
    num_workers: PositiveInt = Field(2, description="Rollout workers.")
    routing: Literal["sample", "group"] = Field(
        "sample",
        description="sample: a group's samples share the workers; group: they stay together and share one prefill.",
    )
    steal: bool = Field(True, description="A worker with free slots takes requests that others have queued.")
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: NonNegativeFloat = 0.0
    threads_per_worker: PositiveInt = Field(1, description="torch threads of a rollout worker.")
    cpus_for_learner: PositiveFloat = 1.0
    gpus_for_learner: NonNegativeFloat = 0.0
    threads_for_learner: PositiveInt = 2
    start_timeout_s: PositiveFloat = Field(120.0, description="Deadline for Ray and all actors to be ready.")
    rollout_timeout_s: PositiveFloat = Field(1800.0, description="Deadline for the rollouts of one step.")
    update_timeout_s: PositiveFloat = Field(1800.0, description="Deadline for one policy update.")
    dashboard: bool = False
    dashboard_port: int = Field(8265, ge=1024, le=65535)


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
    keep_last: PositiveInt = 2


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
    engine: EngineConfig = EngineConfig()
    drafter: DrafterConfig = DrafterConfig()
    budget: BudgetConfig = BudgetConfig()
    cluster: ClusterConfig = ClusterConfig()
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

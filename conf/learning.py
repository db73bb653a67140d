"""The sections about learning: correction, algorithm, learners.

Invariants: as in conf/schema.py, which puts the sections together.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from slipstream.conf.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share, Strict


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
    max_tokens_per_microbatch: PositiveInt = Field(
        8192, description="Tokens of one forward-backward pass of one learner, padding included."
    )

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


class LearnerConfig(Strict):
    """How the learners compute an update; what it is, up to rounding, depends on none of these but the masters."""

    packing: bool = Field(True, description="Samples side by side in one row, without padding, instead of a row each.")
    activation_checkpointing: bool = Field(
        False, description="Keep only the inputs of each layer for the backward pass; compute the rest again."
    )
    master_weights_float32: bool = Field(
        True, description="model.dtype=bfloat16: the optimiser changes float32 weights, so that small updates add up."
    )
    reduce_every_microbatch: bool = Field(
        True, description="Several learners share gradients out after each micro-batch; false: once, held whole."
    )

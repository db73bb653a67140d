"""The part of the schema about Ray, the actors of a job, and what becomes of those that fail.

Invariants: as those of conf/schema.py, which holds the whole.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from slipstream.conf.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict


class ClusterConfig(Strict):
    """Ray: a local one of our own, or an existing one by address."""

    address: str | None = Field(None, description="null starts a local Ray; `auto` or host:port joins a running one.")
    allow_unauthenticated: bool = Field(
        False, description="Join a Ray that other machines reach although it asks for no token."
    )
    num_workers: PositiveInt = Field(2, description="Rollout workers.")
    routing: Literal["sample", "group", "prompt"] = Field(
        "sample",
        description="sample: a group's samples share the workers; group: they stay together and share one prefill; "
        "prompt: as group, and a prompt goes to the worker that served it before (where workers share no index).",
    )
    prompt_load_limit: float = Field(
        1.25, gt=1, le=16, description="routing=prompt: a worker loaded above this multiple of the mean is passed over."
    )
    steal: bool = Field(True, description="A worker with free slots takes requests that others have queued.")
    max_queued_per_worker: NonNegativeInt | None = Field(
        None,
        description="Requests that a worker holds beyond its slots, others wait in the pool; null: as many as slots.",
    )
    max_worker_restarts: NonNegativeInt = Field(
        3, description="Of each worker that dies or hangs, over the job; 0: the first death ends the job."
    )
    max_deaths_per_request: PositiveInt = Field(
        3, description="A request that so many dying workers held is taken for the cause and ends the job."
    )
    worker_timeout_s: PositiveFloat = Field(
        60.0, description="A worker that answers no ping for so long is hung; pings have a thread of their own."
    )
    worker_step_timeout_s: PositiveFloat = Field(
        900.0, description="A worker in one single engine step for so long, compilation included, is hung."
    )
    placement: Literal["none", "pack", "spread", "strict_spread"] = Field(
        "none",
        description="none: Ray's choice. Else all actors are reserved at once in a placement group: on few nodes "
        "(pack), on many (spread), or on one each (strict_spread).",
    )
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: NonNegativeFloat = 0.0
    threads_per_worker: PositiveInt = Field(1, description="torch threads of a rollout worker.")
    num_learners: PositiveInt = Field(1, description="Learners that share one policy's weights and each update's work.")
    cpus_for_learner: PositiveFloat = Field(1.0, description="Of each learner.")
    gpus_for_learner: NonNegativeFloat = Field(0.0, description="Of each learner; a fraction only with one learner.")
    threads_for_learner: PositiveInt = Field(2, description="torch threads of each learner.")
    start_timeout_s: PositiveFloat = Field(120.0, description="Deadline for Ray and all actors to be ready.")
    rollout_timeout_s: PositiveFloat = Field(1800.0, description="Deadline for the rollouts of one step.")
    update_timeout_s: PositiveFloat = Field(1800.0, description="Deadline for one policy update.")
    dashboard: bool = False
    dashboard_port: int = Field(8265, ge=1024, le=65535)

    @property
    def num_cpus(self) -> float:
        """CPUs that all actors together reserve."""
        return self.num_workers * self.cpus_per_worker + self.num_learners * self.cpus_for_learner

    @property
    def num_gpus(self) -> float:
        """GPUs that all actors together reserve."""
        return self.num_workers * self.gpus_per_worker + self.num_learners * self.gpus_for_learner

    @model_validator(mode="after")
    def _learners(self) -> ClusterConfig:
        # NCCL refuses two ranks on one GPU.
        if self.num_learners > 1 and self.gpus_for_learner % 1:
            raise ValueError(
                f"cluster.gpus_for_learner={self.gpus_for_learner} with cluster.num_learners={self.num_learners}; "
                "allowed: a whole number, because learners cannot share a GPU"
            )
        return self

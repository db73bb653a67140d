"""The schema's section `weights`: how new weights come to the rollout workers.

Invariants: as those of conf/schema.py, which it is a part of.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from slipstream.conf.base import Strict


class WeightsConfig(Strict):
    """How new weights come from the learner to the rollout workers."""

    transport: Literal["auto", "shared_memory", "object_store", "disk", "broadcast"] = Field(
        "auto",
        description="shared_memory: where the learner's weights live or are gathered, mapped by the workers of its "
        "node, who read it while it is summed up; object_store: Ray's, mapped by all workers of a node; "
        "disk: safetensors on a shared folder; broadcast: nccl between GPUs, gloo between CPUs. auto: shared_memory in "
        "a Ray of the job's own, where there is memory for three versions and weights.delta is off; else object_store.",
    )
    delta: bool = Field(False, description="Send only the blocks that changed; a late worker gets a whole version.")
    block_bytes: int = Field(
        65536, ge=64, le=2**30, multiple_of=64, description="Bytes that share a checksum and travel together."
    )
    verify: bool = Field(True, description="Compare every block with its checksum before it is served.")
    folder: str | None = Field(
        None,
        description="disk: a folder that all nodes see, the run's name is added; null: weights/ in the run folder.",
    )

    @model_validator(mode="after")
    def _cross_checks(self) -> WeightsConfig:
        if self.delta and not self.verify:
            raise ValueError("weights.verify=false with weights.delta=true; changes need weights.verify=true")
        if self.delta and self.transport == "shared_memory":
            raise ValueError(
                "weights.transport=shared_memory with weights.delta=true; changes need object_store, disk or broadcast"
            )
        if self.folder is not None and self.transport != "disk":
            raise ValueError(
                f"weights.folder={self.folder} with weights.transport={self.transport}; allowed: weights.transport=disk"
            )
        return self

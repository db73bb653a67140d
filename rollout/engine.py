"""The Engine protocol: what turns requests into rollouts, whatever runs the model.

Invariants: `step` performs at most one forward pass of the policy; every submitted request leaves exactly once, as
a rollout returned by `step`, `abort` or `drain`, or unstarted from `take_queued`; a request that cannot be served
leaves with finish "error" and a reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from slipstream.drafter.base import SOURCE_NAMES
from slipstream.rollout.types import Request, Rollout


class EngineError(RuntimeError):
    """The engine cannot go on; the message names the request or the setting at fault."""


@dataclass(slots=True)
class EngineStats:
    """Totals since the last `stats(reset=True)`.

    Seconds are wall time inside `step`: forward_s in the model, sample_s in sampling and verification (on a GPU both
    are in forward_s, with what the host does meanwhile), draft_s in the drafter and the budget, other_s the rest.
    graph_steps: passes that were a CUDA graph's. prefill_tokens: prompt tokens computed; shared_prompt_tokens: those
    that a sample reads where another one's slot holds them; copied_prompt_tokens: those brought to another slot.
    invalid_drafts: drafts cut at a token outside the vocabulary.
    drafted_by_source and accepted_by_source: tokens per source name.
    """

    steps: int = 0
    graph_steps: int = 0
    live_sum: int = 0
    prefill_tokens: int = 0
    shared_prompt_tokens: int = 0
    copied_prompt_tokens: int = 0
    forward_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    failed: int = 0
    drafted: int = 0
    accepted: int = 0
    invalid_drafts: int = 0
    draft_rounds: int = 0
    rounds: int = 0
    forward_s: float = 0.0
    sample_s: float = 0.0
    draft_s: float = 0.0
    other_s: float = 0.0
    drafted_by_source: dict[str, int] = field(default_factory=dict)
    accepted_by_source: dict[str, int] = field(default_factory=dict)

    def count_drafts(self, draft_rounds: int, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """One verified step: requests with a draft; draft tokens and kept ones of each of SOURCE_NAMES."""
        self.drafted += sum(drafted)
        self.accepted += sum(accepted)
        self.draft_rounds += draft_rounds
        for name, num_drafted, num_accepted in zip(SOURCE_NAMES, drafted, accepted, strict=True):
            if num_drafted:
                self.drafted_by_source[name] = self.drafted_by_source.get(name, 0) + num_drafted
                self.accepted_by_source[name] = self.accepted_by_source.get(name, 0) + num_accepted

    @property
    def total_s(self) -> float:
        """Wall seconds spent inside `step`."""
        return self.forward_s + self.sample_s + self.draft_s + self.other_s


@dataclass(frozen=True, slots=True)
class Patch:
    """New bytes of some blocks of a tensor. blocks: their ascending numbers, int64 [B]; data: flat uint8, one block
    behind the other; dtype: of the sender's tensor; block_elements: of a block, the tensor's last may be shorter."""

    blocks: np.ndarray
    data: torch.Tensor
    dtype: torch.dtype
    block_elements: int


@runtime_checkable
class Engine(Protocol):
    """Continuous batching over one copy of the policy."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests in the given order."""

    def step(self) -> list[Rollout]:
        """Advances every live request by at least one token; returns what finished."""

    def check_policy(self, shapes: Mapping[str, tuple[int, ...]], version: int) -> None:
        """Raises EngineError naming a missing, unknown or misshapen tensor of weights to come."""

    def update_policy(
        self,
        weights: Mapping[str, torch.Tensor],
        version: int,
        adopt: bool = False,
        patches: Sequence[Mapping[str, Patch]] = (),
    ) -> None:
        """Replaces the policy's weights; tokens sampled from now on carry `version`. adopt: the engine may compute with
        the given tensors; patches: changes on top of the weights, or of what is served where there are none."""

    def update_draft(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Replaces a learned drafter's weights; a no-op for drafters without weights."""

    def abort(self, uids: Iterable[int]) -> list[Rollout]:
        """Takes requests out, queued or live, and returns what they have with finish "abort"."""

    def take_queued(self, max_count: int) -> list[Request]:
        """Takes out up to max_count requests that have not started, those that would start last: they run elsewhere."""

    def drain(self, timeout_s: float) -> list[Rollout]:
        """Steps until nothing is queued or live; raises EngineError naming the rest when the deadline passes."""

    def stats(self, reset: bool = False) -> EngineStats:
        """Totals since the last reset."""

"""Requests and rollouts: the nouns that every room shares.

Invariants
- A uid names one sample for ever: it is a pure function of (run seed, step, group, sample), so a restarted job
  asks for the same noise and gets the same tokens (laws 1 and 5).
- Every token of a rollout carries the log-probability under the distribution it was really sampled from and the
  version of the policy that sampled it (law 2).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one request are drawn.

    max_new_tokens: response tokens at most, at least 1.
    temperature: divides the logits; 0 is greedy.
    top_p: keep the smallest set of most probable tokens with at least this mass; 1 keeps all.
    top_k: keep the k most probable tokens, applied before top_p; 0 keeps all.
    seed: key of the noise stream, 0 <= seed < 2**63.
    stop_token_ids: the response ends with the first of these; it is kept as the last token.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature,
                0.0 <= self.temperature < float("inf"),
                "0 (greedy) or above, finite",
            ),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or above"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
        )
        for name, value, ok, allowed in checks:
            if not ok:
                raise ValueError(f"sampling.{name} is {value!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to draw.

    uid: see `request_uid`; 0 <= uid < 2**63.
    prompt_id: stable name of the prompt over epochs; the drafter's history is kept per prompt_id.
    group: index of the group of samples of one prompt within a step.
    prompt: [p] int32 token ids, p >= 1.
    prefill: [r] int32 response tokens that exist already (a rollout carried on); noise positions continue at r.
    """

    uid: int
    prompt_id: str
    group: int
    prompt: np.ndarray
    sampling: Sampling
    prefill: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(slots=True)
class SpecStats:
    """What speculation did for one rollout.

    rounds: forward passes that produced tokens; drafted, accepted: draft tokens verified and kept.
    by_source: accepted draft tokens per source name. draft_seconds, verify_seconds: this rollout's share (time of
    a step divided by its live requests).
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    by_source: dict[str, int] = field(default_factory=dict)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


@dataclass(slots=True)
class Rollout:
    """A finished request.

    tokens: [n] int32 response, stop token included; logprobs: [n] float32, log p of each token under the
    distribution sampled from; policy_versions: [n] int32; error: why, when finish is "error".
    """

    request: Request
    tokens: np.ndarray
    logprobs: np.ndarray
    policy_versions: np.ndarray
    finish: FinishReason
    spec: SpecStats = field(default_factory=SpecStats)
    error: str = ""


def request_uid(run_seed: int, step: int, group: int, sample: int) -> int:
    """A uid in [0, 2**63) that depends on nothing but its arguments (blake2b, so equal on every machine)."""
    text = f"{run_seed}/{step}/{group}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

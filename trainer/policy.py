"""The policy learner: one Ray actor that turns samples into new weights.

Invariants: an update is a pure function of (weights, optimiser state, samples); log-probabilities are taken at the
sampling temperature (law 2); an update without a single token is skipped and said so in its metrics; nothing is
pickled to disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.conf.schema import AlgoConfig
from slipstream.rollout.model_loader import default_device, load_policy
from slipstream.rollout.stacks import thread_stacks
from slipstream.rollout.weight_handle import WeightHandle
from slipstream.trainer.batch import MicroBatch, TrainSample, micro_batches, split_updates
from slipstream.trainer.checkpoint import flatten_optimizer, load_tensors, restore_optimizer, save_tensors
from slipstream.trainer.correction import correct_samples
from slipstream.trainer.losses import aggregate, kl_penalty, policy_loss, token_logprobs
from slipstream.trainer.weight_sync import WeightPublisher, WeightSpec, named_weights


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """What the learner is built from; algo as in conf/schema.py, temperature and max_new_tokens as sampled."""

    model_path: str
    dtype: str
    random_init_seed: int | None
    num_gpus: float
    num_threads: int
    temperature: float
    max_new_tokens: int
    algo: AlgoConfig
    weights: WeightSpec = field(default_factory=WeightSpec)


def learning_rate(algo: AlgoConfig, step: int) -> float:
    """The rate of training step 1, 2, ...: linear warm-up, then the schedule down to 0 after the last step."""
    if step <= algo.warmup_steps:
        return algo.learning_rate * step / algo.warmup_steps
    done = (step - 1 - algo.warmup_steps) / max(1, algo.num_steps - algo.warmup_steps)
    done = min(1.0, max(0.0, done))
    match algo.schedule:
        case "cosine":
            return algo.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            return algo.learning_rate * (1.0 - done)
    return algo.learning_rate


class PolicyLearner:
    """Policy gradient with AdamW on one device."""

    def __init__(self, spec: LearnerSpec) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec, self._algo = spec, spec.algo
        self._device = default_device(spec.num_gpus)
        self._model = load_policy(spec.model_path, spec.dtype, self._device, spec.random_init_seed)
        self._model.set_attn_implementation("sdpa")
        self._publisher = WeightPublisher(spec.weights)
        self._reference = None
        if self._algo.kl_coef > 0:
            self._reference = load_policy(spec.model_path, spec.dtype, self._device, spec.random_init_seed).eval()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=self._algo.learning_rate,
            betas=(self._algo.adam_beta1, self._algo.adam_beta2),
            weight_decay=self._algo.weight_decay,
        )

    def ready(self) -> dict[str, Any]:
        """Answers once the model is loaded."""
        return {"device": self._device, "num_parameters": sum(p.numel() for p in self._model.parameters())}

    def update(self, samples: list[TrainSample], step: int) -> dict[str, float]:
        """One training step: `num_updates_per_step` optimiser updates over the samples; metrics in verl's names."""
        rate = learning_rate(self._algo, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        samples = [sample for sample in samples if len(sample.response)]
        corrected: dict[str, float] = {}
        if self._algo.recomputes_logprobs and samples:
            samples, corrected = correct_samples(samples, self._logprobs(samples), self._algo)
        totals: dict[str, float] = {}
        parts = split_updates(len(samples), self._algo.num_updates_per_step)
        for part in parts:
            for name, value in self._update_once([samples[i] for i in part]).items():
                totals[name] = totals.get(name, 0.0) + value / len(parts)
        return totals | corrected | {"actor/lr": rate, "actor/num_updates": float(len(parts))}

    @torch.no_grad()
    def _logprobs(self, samples: list[TrainSample]) -> list[np.ndarray]:
        """log p of every response token under the current weights, one array for each sample."""
        self._model.eval()
        out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(samples)
        for batch in micro_batches(samples, self._algo.max_tokens_per_microbatch):
            targets = torch.from_numpy(batch.targets).to(self._device)
            logp, _ = token_logprobs(self._logits(batch, self._model), targets, self._spec.temperature)
            for row, i in enumerate(batch.order):
                first = len(samples[i].prompt) - 1
                out[i] = logp[row, first : first + len(samples[i].response)].float().cpu().numpy()
        return out

    def _logits(self, batch: MicroBatch, model: torch.nn.Module) -> torch.Tensor:
        inputs = torch.from_numpy(batch.input_ids).to(self._device)
        attention = torch.from_numpy(batch.attention).to(self._device)
        return model(input_ids=inputs, attention_mask=attention, use_cache=False).logits

    def _update_once(self, samples: list[TrainSample]) -> dict[str, float]:
        num_tokens = sum(sample.num_tokens for sample in samples)
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, float] = {}
        for batch in micro_batches(samples, self._algo.max_tokens_per_microbatch):
            loss, part = self._loss(batch, num_tokens, len(samples))
            loss.backward()
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._algo.grad_clip_norm)
        if torch.isfinite(norm):
            self._optimizer.step()
        return metrics | {
            "actor/grad_norm": float(norm),
            "actor/updates_skipped_nonfinite": 0.0 if torch.isfinite(norm) else 1.0,
        }

    def _loss(
        self, batch: MicroBatch, num_tokens: int, num_sequences: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        algo = self._algo
        tensors = {
            name: torch.from_numpy(getattr(batch, name)).to(self._device)
            for name in ("targets", "mask", "old_logp", "rollout_logp", "weights", "advantages")
        }
        mask, targets = tensors["mask"], tensors["targets"]
        logp, entropy = token_logprobs(self._logits(batch, self._model), targets, self._spec.temperature)
        losses, metrics = policy_loss(
            logp,
            tensors["old_logp"],
            tensors["advantages"],
            mask,
            algo.clip_ratio_low,
            algo.clip_ratio_high,
            algo.dual_clip,
            num_tokens,
            algo.loss,
        )
        totals = num_tokens, num_sequences, self._spec.max_new_tokens
        loss = aggregate(losses * tensors["weights"], mask, algo.loss_agg, *totals)
        metrics["actor/pg_loss"] = loss.detach()
        metrics["actor/entropy"] = (entropy * mask).sum() / num_tokens
        difference = (logp.detach() - tensors["rollout_logp"]).abs() * mask
        metrics["training/rollout_logprobs_diff_mean"] = difference.sum() / num_tokens
        if self._reference is not None:
            with torch.no_grad():
                reference, _ = token_logprobs(self._logits(batch, self._reference), targets, self._spec.temperature)
            penalty = kl_penalty(logp, reference, algo.kl_estimator)
            kl = aggregate(penalty, mask, algo.loss_agg, *totals)
            metrics["actor/kl_loss"] = kl.detach()
            loss = loss + algo.kl_coef * kl
        return loss, metrics

    def stacks(self) -> str:
        """Where every thread of this process is, innermost call last."""
        return thread_stacks()

    def weights(self, version: int) -> WeightHandle:
        """Publishes the current policy as `version`; workers fetch it by the handle until the next one is published."""
        return self._publisher.publish({"policy": named_weights(self._model)}, version)

    def save(self, folder: str) -> None:
        """Writes the policy as a Hugging Face folder (policy/) and the optimiser (optimizer.safetensors)."""
        path = Path(folder)
        self._model.save_pretrained(path / "policy", safe_serialization=True)
        save_tensors(path / "optimizer.safetensors", flatten_optimizer(self._optimizer))

    def load(self, folder: str) -> None:
        """Reads what `save` wrote."""
        path = Path(folder)
        saved = load_policy(path / "policy", self._spec.dtype, self._device)
        self._model.load_state_dict(saved.state_dict())
        restore_optimizer(self._optimizer, load_tensors(path / "optimizer.safetensors", self._device))

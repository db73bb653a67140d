"""The policy learner: a Ray actor that turns samples into new weights, alone or as one of several that share them.

Invariants
- An update is a pure function of (weights, optimiser state, samples), up to rounding the same for any number of
  learners; the loss of each token is divided by the tokens of the whole update, over all learners.
- Log-probabilities are taken at the sampling temperature (law 2).
- An update without a single token is skipped and said so in its metrics; nothing is pickled to disk.
- All learners get the same calls with the same arguments in the same order: most of them talk to each other inside.
"""

from __future__ import annotations

import math
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from slipstream.conf.learning import AlgoConfig, LearnerConfig
from slipstream.rollout.model_loader import DTYPES, default_device, load_policy
from slipstream.rollout.stacks import thread_stacks
from slipstream.rollout.weight_handle import WeightHandle
from slipstream.trainer.batch import PackedBatch, PaddedBatch, TrainSample, pack, pad, sequence_lengths, split_updates
from slipstream.trainer.correction import correct_samples
from slipstream.trainer.losses import aggregate, kl_penalty, policy_loss
from slipstream.trainer.micro_plan import plan_packed, plan_padded
from slipstream.trainer.packed_attention import batch_logprobs, probe_packing, use_packed_attention
from slipstream.trainer.policy_files import LearnerFiles, learner_files, load_learner
from slipstream.trainer.sharding import (
    all_sum,
    group_of_one,
    join_group,
    listen,
    shard,
    share_out_again,
    sum_over_ranks,
    weight_shapes,
    whole,
    whole_weights,
)
from slipstream.trainer.weight_sync import WeightPublisher, WeightSpec, move_weights, named_weights, node_address


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """What a learner is built from; algo and learner as in conf/learning.py, temperature and max_new_tokens as sampled.

    call_timeout_s: how long a learner waits for the others in one exchange.
    """

    model_path: str
    dtype: str
    random_init_seed: int | None
    num_gpus: float
    num_threads: int
    temperature: float
    max_new_tokens: int
    algo: AlgoConfig
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightSpec = field(default_factory=WeightSpec)
    num_learners: int = 1
    start_timeout_s: float = 120.0
    call_timeout_s: float = 1800.0

    @property
    def keeps_masters(self) -> bool:
        """Whether the optimiser's weights are wider than the policy's."""
        return self.learner.master_weights_float32 and self.dtype != "float32"


def learner_names(num_learners: int) -> list[str]:
    """What the learners are called where people read of them, rank 0 first."""
    return ["the policy learner"] if num_learners == 1 else [f"policy learner {rank}" for rank in range(num_learners)]


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
    """Policy gradient with AdamW on one device; alone, or rank `rank` of spec.num_learners."""

    def __init__(self, spec: LearnerSpec, rank: int = 0) -> None:
        torch.set_num_threads(spec.num_threads)
        self._spec, self._algo, self._rank = spec, spec.algo, rank
        self._device = default_device(spec.num_gpus)
        self._mesh: DeviceMesh | None = None
        self._listener: socket.socket | None = None
        self._gathered: dict[str, torch.Tensor] | None = None
        self._reference: torch.nn.Module | None = None
        self._settle_s = 0.0
        # Weights that are published as they are computed with need no copy to be read by others.
        alone = spec.num_learners == 1 and not spec.keeps_masters and self._device == "cpu"
        self._publisher = WeightPublisher(replace(spec.weights, resident=alone))
        if spec.num_learners == 1:
            if spec.keeps_masters:
                self._mesh = group_of_one(self._device, spec.call_timeout_s)
            self._build()

    # ---- start

    def listen(self) -> tuple[str, int]:
        """Rank 0: (host, port) of the rendezvous, where Ray knows this node: on loopback in a local Ray."""
        host = node_address()
        self._listener = listen(host)
        return host, self._listener.getsockname()[1]

    def join(self, address: tuple[str, int]) -> dict[str, Any]:
        """Waits for the other learners and loads this one's share of the model; as `ready`."""
        spec = self._spec
        self._mesh = join_group(
            self._rank,
            spec.num_learners,
            address,
            self._listener,
            self._device,
            spec.start_timeout_s,
            spec.call_timeout_s,
        )
        self._build()
        return self.ready()

    def ready(self) -> dict[str, Any]:
        """Answers once the model is loaded."""
        return {"device": self._device, "num_parameters": sum(p.numel() for p in self._model.parameters())}

    def _build(self) -> None:
        self._model = self._load_model()
        if self._spec.learner.activation_checkpointing:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self._algo.kl_coef > 0:
            self._reference = self._load_model().eval()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=self._algo.learning_rate,
            betas=(self._algo.adam_beta1, self._algo.adam_beta2),
            weight_decay=self._algo.weight_decay,
        )
        self._snapshot: LearnerFiles | None = None

    def _load_model(self) -> Any:
        spec = self._spec
        alone = self._mesh is None
        # A share is copied, and moved to the GPU, when it is cut: the whole need not fit anywhere.
        device = self._device if alone else "cpu"
        model = load_policy(spec.model_path, spec.dtype, device, spec.random_init_seed, owned=alone)
        if spec.learner.packing:
            use_packed_attention(model, "learner.packing")
        else:
            model.set_attn_implementation("sdpa")
        if self._mesh is not None:
            # From the policy's dtype on purpose: learner and rollout workers start from the same weights.
            masters = torch.float32 if spec.keeps_masters else None
            shard(model, self._mesh, DTYPES[spec.dtype], masters)
        if spec.learner.packing:
            probe_packing(model, "learner.packing")
            share_out_again(model)
        return model

    # ---- updates

    def update(self, samples: list[TrainSample], step: int) -> dict[str, float]:
        """One training step: `num_updates_per_step` optimiser updates over the samples; metrics in verl's names."""
        self._settle_s = 0.0
        self._publisher.begin_settle()
        # Dropout is a function of the step, so that a resumed job needs no state of a generator.
        torch.manual_seed(step)
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
        self._settle()
        waited = {"weights/settle_s": self._settle_s}
        return totals | corrected | waited | {"actor/lr": rate, "actor/num_updates": float(len(parts))}

    def _micro_batches(self, samples: list[TrainSample]) -> list[PaddedBatch | PackedBatch]:
        """This learner's; all learners have the same number."""
        lengths, limit = sequence_lengths(samples), self._algo.max_tokens_per_microbatch
        if self._spec.learner.packing:
            hidden_size = self._model.config.get_text_config().hidden_size
            plan = plan_packed(lengths, limit, self._spec.num_learners, hidden_size)
            return [pack(samples, order) for order in plan[self._rank]]
        plan = plan_padded(lengths, limit, self._spec.num_learners)
        return [pad(samples, order) for order in plan[self._rank]]

    @torch.no_grad()
    def _logprobs(self, samples: list[TrainSample]) -> list[np.ndarray]:
        """log p of every response token under the current weights, one array for each sample, on every learner."""
        self._model.eval()
        ends = np.cumsum([len(sample.response) for sample in samples])
        out = torch.zeros(int(ends[-1]))
        for batch in self._micro_batches(samples):
            logp = batch_logprobs(self._model, batch, self._spec.temperature)[0].float().cpu()
            for row, (i, first) in enumerate(zip(batch.rows.order, batch.rows.first, strict=False)):
                count = len(samples[i].response)
                out[ends[i] - count : ends[i]] = logp[row, first : first + count]
        share_out_again(self._model)
        if self._spec.num_learners > 1:
            # Every place is zero on all learners but one, so the sum is that one's number to the bit.
            out = all_sum(out, self._device)
        return np.split(out.numpy(), ends[:-1])

    def _update_once(self, samples: list[TrainSample]) -> dict[str, float]:
        num_tokens = sum(sample.num_tokens for sample in samples)
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, float] = {}
        batches = self._micro_batches(samples)
        for number, batch in enumerate(batches, start=1):
            if self._mesh is not None:
                last = number == len(batches)
                self._model.set_requires_gradient_sync(last or self._spec.learner.reduce_every_microbatch)
            loss, part = self._loss(batch, num_tokens, len(samples))
            loss.backward()
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        if self._spec.num_learners > 1:
            metrics = sum_over_ranks(metrics, self._device)
        norm = whole(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._algo.grad_clip_norm))
        if torch.isfinite(norm):
            self._settle()
            self._optimizer.step()
        return metrics | {
            "actor/grad_norm": float(norm),
            "actor/updates_skipped_nonfinite": 0.0 if torch.isfinite(norm) else 1.0,
        }

    def _loss(
        self, batch: PaddedBatch | PackedBatch, num_tokens: int, num_sequences: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        algo, temperature = self._algo, self._spec.temperature
        tensors = {
            name: torch.from_numpy(getattr(batch.rows, name)).to(self._device)
            for name in ("mask", "old_logp", "rollout_logp", "weights", "advantages")
        }
        mask = tensors["mask"]
        logp, entropy = batch_logprobs(self._model, batch, temperature)
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
                reference, _ = batch_logprobs(self._reference, batch, temperature)
            penalty = kl_penalty(logp, reference, algo.kl_estimator)
            kl = aggregate(penalty, mask, algo.loss_agg, *totals)
            metrics["actor/kl_loss"] = kl.detach()
            loss = loss + algo.kl_coef * kl
        return loss, metrics

    def stacks(self) -> str:
        """Where every thread of this process is, innermost call last."""
        return thread_stacks()

    # ---- weights

    def _settle(self) -> None:
        """From here on the weights may change: what was published of them does not."""
        started = time.perf_counter()
        move_weights(self._model, self._publisher.settle())
        self._settle_s += time.perf_counter() - started

    def gather(self) -> None:
        """All learners: brings shared-out weights together on rank 0, where the next `weights` takes them."""
        if self._mesh is None:
            return
        dtype, into, first = DTYPES[self._spec.dtype], None, self._rank == 0
        if first:
            room = self._publisher.room({"policy": weight_shapes(self._model, dtype)})
            into = {key.removeprefix("policy/"): place for key, place in room.items()}
        self._gathered = whole_weights(self._model, dtype, first, into)

    def weights(self, version: int) -> WeightHandle:
        """Rank 0, after `gather`: publishes the current policy as `version`; workers fetch it by the handle until the
        next one is published."""
        if self._mesh is None:
            return self._publisher.publish({"policy": named_weights(self._model)}, version)
        if self._gathered is None:
            raise RuntimeError("weights of learners that share them out: gather comes first")
        weights, self._gathered = self._gathered, None
        return self._publisher.publish({"policy": weights}, version)

    def snapshot(self) -> None:
        """All learners: copies weights and optimiser into rank 0's host memory, for the next `save`."""
        self._snapshot = self._files(copied=True)

    def save(self, folder: str) -> None:
        """Writes the policy as a Hugging Face folder (policy/) and the optimiser (optimizer.safetensors).

        After `snapshot` what it copied: on rank 0 alone, from any thread, while updates go on. Else the state of now:
        all learners take part and rank 0 writes, the same files for any number of learners.
        """
        files, self._snapshot = self._snapshot or self._files(copied=False), None
        if files is not None:
            files.write(Path(folder))

    def _files(self, copied: bool) -> LearnerFiles | None:
        spec = self._spec
        return learner_files(self._model, self._optimizer, spec.dtype, spec.keeps_masters, self._rank, copied)

    def load(self, folder: str) -> None:
        """Reads what `save` wrote."""
        self._settle()
        load_learner(Path(folder), self._model, self._optimizer, self._spec.dtype, self._spec.keeps_masters)

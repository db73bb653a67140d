"""What a checkpoint holds of the learners: the policy as a Hugging Face folder, the optimiser as one safetensors file.

Invariants: the files do not show how many learners wrote them, and any number reads them; float32 masters of a narrower
policy are kept to the bit; every learner calls with the same folder, rank 0 writes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from slipstream.rollout.model_loader import DTYPES, load_policy
from slipstream.trainer.checkpoint import copy_tensors, flatten_optimizer, load_tensors, restore_optimizer, save_tensors
from slipstream.trainer.sharding import gathered, part_like, whole_weights

POLICY, OPTIMIZER = "policy", "optimizer.safetensors"
MASTER = "master."
"""Prefix of the float32 weights in the optimiser's file, by the parameters' numbers, where the policy is narrower."""


@dataclass(frozen=True, slots=True)
class LearnerFiles:
    """The state to be written. model: a whole one, for its config; weights: the policy; tensors: the optimiser."""

    model: Any
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Writes both into `folder`."""
        self.model.save_pretrained(folder / POLICY, state_dict=self.weights, safe_serialization=True)
        save_tensors(folder / OPTIMIZER, self.tensors)


def learner_files(
    model: Any, optimizer: torch.optim.Optimizer, dtype: str, keeps_masters: bool, rank: int, copied: bool
) -> LearnerFiles | None:
    """The state of now, on rank 0. model: sharded or not; dtype: of the policy. copied: updates may go on meanwhile."""
    tensors = dict(flatten_optimizer(optimizer))
    if keeps_masters:
        tensors |= {f"{MASTER}{i}": param.detach() for i, param in enumerate(model.parameters())}
    tensors = gathered(tensors, keep=rank == 0)
    policy = _plain_model(model, dtype, rank)
    if rank != 0:
        return None
    weights = policy.state_dict()
    if copied:
        # What was gathered is a copy already, but for what is not shared out: step counters.
        tensors = copy_tensors(tensors)
        weights = copy_tensors(weights) if policy is model else weights
    return LearnerFiles(policy, weights, tensors)


def load_learner(folder: Path, model: Any, optimizer: torch.optim.Optimizer, dtype: str, keeps_masters: bool) -> None:
    """Reads what `LearnerFiles.write` wrote; CheckpointError where it does not fit."""
    saved = load_policy(folder / POLICY, dtype, owned=False).state_dict()
    params = list(model.parameters())
    tensors = load_tensors(folder / OPTIMIZER)
    masters = {name: tensors.pop(name) for name in list(tensors) if name.startswith(MASTER)}
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(part_like(saved[name], tensor))
        for name, tensor in masters.items() if keeps_masters else ():
            param = params[int(name.removeprefix(MASTER))]
            param.copy_(part_like(tensor, param))
    restore_optimizer(optimizer, {name: _part_of(params, name, tensor) for name, tensor in tensors.items()})


def _part_of(params: list[torch.nn.Parameter], name: str, tensor: Tensor) -> Tensor:
    """This learner's part of one entry of `flatten_optimizer`: moments are cut like their parameters."""
    kind, _, rest = name.partition(".")
    place = rest.partition(".")[0]
    if kind != "state" or tensor.dim() == 0 or int(place) >= len(params):
        return tensor
    return part_like(tensor, params[int(place)])


def _plain_model(model: Any, dtype: str, rank: int) -> Any:
    """The model itself, or on rank 0 an unsharded one on the CPU with the same weights; all learners take part."""
    if not hasattr(model, "unshard"):
        return model
    weights = whole_weights(model, DTYPES[dtype], keep=rank == 0)
    if rank != 0:
        return None
    # A copy: building a model writes into its config, which would change the attention of the one that trains.
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa")
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain

"""The weights of learners, as tests compare them."""

from __future__ import annotations

import torch

from slipstream.rollout.model_loader import DTYPES
from slipstream.rollout.weight_handle import FollowedPayload, Share
from slipstream.trainer.learner_group import LearnerGroup
from slipstream.trainer.policy import PolicyLearner
from slipstream.trainer.sharding import whole_weights


def weights_of(learner: PolicyLearner) -> dict[str, torch.Tensor]:
    """Of a learner in this process: copies."""
    weights = whole_weights(learner._model, DTYPES[learner._spec.dtype], keep=True)
    return {name: tensor.clone() for name, tensor in weights.items()}


def weights_of_group(group: LearnerGroup) -> dict[str, torch.Tensor]:
    """What workers would fetch."""
    group.gather(1).result()
    handle = group.weights(1).result()
    payload = handle.frames[0].payload
    arrays = payload.receive(60.0)
    if isinstance(payload, FollowedPayload):
        payload.follow(Share(), handle.verify, 60.0)
    return {spec.name: spec.view(arrays[spec.key]).clone() for spec in handle.layout.tensors}

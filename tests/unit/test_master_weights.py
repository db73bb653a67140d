"""bfloat16 policies with float32 masters: one learner, sharded over itself."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3Config, Qwen3ForCausalLM

from slipstream.conf.learning import AlgoConfig, LearnerConfig
from slipstream.rollout.model_loader import load_policy
from slipstream.rollout.weight_handle import FollowedPayload, Share
from slipstream.trainer.checkpoint import load_tensors
from slipstream.trainer.policy import LearnerSpec, PolicyLearner
from slipstream.trainer.sharding import shard, whole
from slipstream.trainer.weight_segment import SegmentSender
from slipstream.trainer.weight_sync import WeightSpec
from tests.learner_weights import weights_of
from tests.tiny_models import tiny_model
from tests.unit.test_packed_attention import make_samples

# An early update of AdamW moves a weight by about the rate; just below 1, bfloat16 numbers are 2^-8 apart.
RATE = 2.0**-10


@pytest.fixture(autouse=True)
def leave_no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("policy")
    tiny_model("qwen3").to(torch.bfloat16).save_pretrained(path)
    return str(path)


def anonymous_bytes() -> int:
    """Memory of this process that no file is behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.fixture(scope="module")
def large_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """96 MiB of blocks in bfloat16."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("large")
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return str(path)


def make_learner(policy: str, masters: bool, **learner: bool) -> PolicyLearner:
    algo = AlgoConfig(num_steps=50, learning_rate=RATE, max_tokens_per_microbatch=64)
    config = LearnerConfig(master_weights_float32=masters, **learner)
    return PolicyLearner(LearnerSpec(policy, "bfloat16", None, 0.0, 1, 1.0, 20, algo, config))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say")
def test_one_of_many_learners_never_holds_more_than_its_part_and_a_block(large_policy: str) -> None:
    dist.init_process_group("fake", rank=1, world_size=8, store=FakeStore())
    mesh = init_device_mesh("cpu", (8,))
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be taken again unseen
    peak, done, before = 0, threading.Event(), anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = load_policy(large_policy, "bfloat16", owned=False)
        shard(model, mesh, torch.bfloat16, torch.float32)
    finally:
        done.set()
        watcher.join(10.0)
    whole_bytes = sum(4 * param.numel() for param in model.parameters())
    assert all(param.dtype == torch.float32 for param in model.parameters())
    # An eighth, a block of sixteen, and what the allocator keeps of freed blocks.
    assert peak - before < 0.4 * whole_bytes


def test_updates_below_the_resolution_add_up(policy: str) -> None:
    """Norm weights start at 1. One update is a quarter of the distance to the next number, and rounds to nothing."""
    samples, moved = make_samples(1, 3), {}
    for masters in (False, True):
        learner = make_learner(policy, masters)
        before = weights_of(learner)
        for _ in range(8):
            learner.update(samples, 1)
        after = weights_of(learner)
        assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
        names = [name for name in before if name.endswith("layernorm.weight")]
        assert all((before[name] == 1).all() for name in names)
        moved[masters] = sum(int((after[name] != 1).sum()) for name in names)
    assert moved[False] == 0
    assert moved[True] > 20


def test_masters_compute_with_the_policys_own_weights(policy: str) -> None:
    """What the learner samples from in the loss is what the workers serve: bfloat16, not the masters (law 2)."""
    samples = make_samples(2)
    plain, masters = make_learner(policy, False), make_learner(policy, True)
    for one, other in zip(plain._logprobs(samples), masters._logprobs(samples), strict=True):
        assert (one == other).all()
    masters.update(samples, 1)
    served = load_policy(policy, "bfloat16")
    served.load_state_dict(weights_of(masters), strict=False)
    plain._model.load_state_dict(served.state_dict())
    for one, other in zip(plain._logprobs(samples), masters._logprobs(samples), strict=True):
        assert (one == other).all()


def test_what_is_gathered_is_published_where_it_was_gathered(policy: str) -> None:
    spec = make_learner(policy, True)._spec
    dist.destroy_process_group()
    learner = PolicyLearner(replace(spec, weights=WeightSpec("shared_memory")))
    for step in (1, 2, 3):
        learner.update(make_samples(step), step)
        learner.gather()
        handle, expected = learner.weights(step), weights_of(learner)
        payload = handle.frames[0].payload
        assert isinstance(payload, FollowedPayload)
        arrays = payload.receive(10.0)
        payload.follow(Share(), True, 10.0)
        for tensor in handle.layout.tensors:
            assert torch.equal(tensor.view(arrays[tensor.key]), expected[tensor.name]), tensor.name
        sender = learner._publisher._sender
        assert isinstance(sender, SegmentSender)
        assert sender._home is not None
        assert sender._current is sender._home.place, "it was copied"
    learner._publisher.close()


def test_masters_come_back_to_the_bit(policy: str, tmp_path: Path) -> None:
    first, samples = make_learner(policy, True), make_samples(3)
    first.update(samples, 1)
    first.save(str(tmp_path))
    saved = load_tensors(tmp_path / "optimizer.safetensors")
    masters = [tensor for name, tensor in saved.items() if name.startswith("master.")]
    assert len(masters) == len(list(first._model.parameters()))
    assert all(tensor.dtype == torch.float32 for tensor in masters)
    assert load_policy(tmp_path / "policy", "bfloat16").config.dtype == torch.bfloat16
    second = make_learner(policy, True)
    second.load(str(tmp_path))
    for one, other in zip(first._model.parameters(), second._model.parameters(), strict=True):
        assert torch.equal(whole(one.detach()), whole(other.detach()))
    for learner in (first, second):
        learner.update(samples, 2)
    after = weights_of(second)
    for name, tensor in weights_of(first).items():
        assert torch.equal(tensor, after[name])


def test_a_shared_out_model_packs_after_its_probe(policy: str) -> None:
    """The probe has no backward pass; the optimiser has to hold the weights all the same."""
    samples = make_samples(4)
    moved: dict[bool, dict[str, float]] = {}
    for packing in (False, True):
        learner = make_learner(policy, True, packing=packing)
        before = {name: whole(param.detach()).clone() for name, param in learner._model.named_parameters()}
        learner.update(samples, 1)
        after = {name: whole(param.detach()).clone() for name, param in learner._model.named_parameters()}
        moved[packing] = {name: float((after[name] - before[name]).norm()) for name in before}
    assert min(moved[False].values()) > 0
    assert moved[True] == pytest.approx(moved[False], rel=0.1)

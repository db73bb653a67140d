"""The learner: micro-batches, updates, schedules, and what it saves."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slipstream.conf.learning import AlgoConfig, CorrectionConfig
from slipstream.rollout.model_loader import load_policy
from slipstream.rollout.weight_handle import FollowedPayload, Share
from slipstream.trainer.batch import TrainSample
from slipstream.trainer.policy import LearnerSpec, PolicyLearner, learning_rate
from slipstream.trainer.weight_segment import SegmentSender
from slipstream.trainer.weight_sync import WeightSpec, named_weights
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("policy")
    tiny_model("qwen3").save_pretrained(path)
    return str(path)


def weights_of(learner: PolicyLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named_weights(learner._model).items()}


def make_learner(folder: str, **algo: object) -> PolicyLearner:
    config = AlgoConfig(**({"learning_rate": 1e-3, "num_steps": 10} | algo))
    return PolicyLearner(LearnerSpec(folder, "float32", None, 0.0, 1, 1.0, 20, config))


def make_samples(seed: int, num: int = 6) -> list[TrainSample]:
    rng = np.random.default_rng(seed)
    model = tiny_model("qwen3")
    out = []
    for _ in range(num):
        prompt = rng.integers(3, 96, rng.integers(1, 9)).astype(np.int32)
        response = rng.integers(3, 96, rng.integers(1, 20)).astype(np.int32)
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        out.append(TrainSample(prompt, response, logp.numpy(), float(rng.normal())))
    return out


def test_micro_batches_do_not_change_the_update(folder: str) -> None:
    samples = make_samples(0)
    results = []
    for max_tokens in (16, 10_000):
        learner = make_learner(folder, max_tokens_per_microbatch=max_tokens)
        metrics = learner.update(samples, step=1)
        assert metrics.pop("weights/settle_s") >= 0.0  # seconds waited: nothing that the update computes
        results.append((metrics, weights_of(learner)))
    for name, value in results[0][0].items():
        assert value == pytest.approx(results[1][0][name], rel=1e-3, abs=1e-5), name
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], atol=2e-4, rtol=0)


def test_an_update_waits_until_the_version_before_is_written(folder: str) -> None:
    spec = make_learner(folder)._spec
    learner = PolicyLearner(replace(spec, weights=WeightSpec("shared_memory")))
    before, sender = weights_of(learner), learner._publisher._sender
    assert isinstance(sender, SegmentSender)
    # The thread that copies is held up, as on a machine with too much to do.
    sender._threads.submit(time.sleep, 0.5)
    handle = learner.weights(1)
    learner.update(make_samples(1), step=1)
    payload = handle.frames[0].payload
    assert isinstance(payload, FollowedPayload)
    arrays = payload.receive(10.0)
    payload.follow(Share(), True, 10.0)
    assert not torch.equal(weights_of(learner)["model.norm.weight"], before["model.norm.weight"])
    for spec_of in handle.layout.tensors:
        assert torch.equal(spec_of.view(arrays[spec_of.key]), before[spec_of.name]), spec_of.name
    learner._publisher.close()


def test_weights_that_live_in_shared_memory_are_updated_alike(folder: str) -> None:
    spec, served = make_learner(folder)._spec, []
    for transport in ("object_store", "shared_memory"):
        learner = PolicyLearner(replace(spec, weights=WeightSpec(transport)))
        versions = []
        for step in range(1, 4):
            learner.update(make_samples(step), step=step)
            if transport == "object_store":
                versions.append(weights_of(learner))
                continue
            handle = learner.weights(step)
            payload = handle.frames[0].payload
            assert isinstance(payload, FollowedPayload)
            arrays = payload.receive(10.0)
            payload.follow(Share(), True, 10.0)
            versions.append({one.name: one.view(arrays[one.key]) for one in handle.layout.tensors})
        served.append(versions)
        sender = learner._publisher._sender
    assert isinstance(sender, SegmentSender)
    assert sender._home is not None
    assert sender._current is sender._home.place, "the last version was not copied"
    for stored, shared in zip(*served, strict=True):
        for name, tensor in shared.items():
            assert torch.equal(tensor, stored[name]), name
    learner._publisher.close()


def test_an_update_moves_towards_the_advantage(folder: str) -> None:
    samples = [
        TrainSample(s.prompt, s.response, s.logprobs, 1.0 if i % 2 else -1.0) for i, s in enumerate(make_samples(1))
    ]
    learner = make_learner(folder)
    before = learner.update(samples, step=1)
    assert before["training/rollout_logprobs_diff_mean"] < 1e-5
    assert before["actor/ppo_kl"] == pytest.approx(0.0, abs=1e-5)
    assert before["actor/grad_norm"] > 0
    after = learner.update(samples, step=2)
    assert after["actor/pg_loss"] < before["actor/pg_loss"] - 1e-3


def test_kl_is_zero_at_the_reference_and_grows(folder: str) -> None:
    learner = make_learner(folder, kl_coef=0.1)
    samples = make_samples(2)
    assert learner.update(samples, 1)["actor/kl_loss"] == pytest.approx(0.0, abs=1e-5)
    assert learner.update(samples, 2)["actor/kl_loss"] > 1e-5


def test_a_step_without_tokens_is_skipped(folder: str) -> None:
    learner = make_learner(folder)
    before = weights_of(learner)
    assert learner.update([], step=1)["actor/num_updates"] == 0
    empty = TrainSample(np.array([1], np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32), 1.0)
    assert learner.update([empty], step=1)["actor/num_updates"] == 0
    assert all(torch.equal(tensor, weights_of(learner)[name]) for name, tensor in before.items())


def test_a_non_finite_gradient_does_not_reach_the_weights(folder: str) -> None:
    learner = make_learner(folder)
    before = weights_of(learner)
    sample = make_samples(3, 1)[0]
    broken = TrainSample(sample.prompt, sample.response, sample.logprobs, float("nan"))
    assert learner.update([broken], step=1)["actor/updates_skipped_nonfinite"] == 1.0
    assert all(torch.equal(tensor, weights_of(learner)[name]) for name, tensor in before.items())


def test_saved_and_loaded_learners_go_on_alike(folder: str, tmp_path: Path) -> None:
    first, samples = make_learner(folder), make_samples(4)
    first.update(samples, 1)
    first.save(str(tmp_path))
    second = make_learner(folder)
    second.load(str(tmp_path))
    for learner in (first, second):
        learner.update(samples, 2)
    for name, tensor in weights_of(first).items():
        assert torch.equal(tensor, weights_of(second)[name])


def test_schedules() -> None:
    constant = AlgoConfig(learning_rate=1.0, num_steps=10, warmup_steps=4)
    assert [learning_rate(constant, step) for step in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    for schedule in ("cosine", "linear"):
        rates = [learning_rate(AlgoConfig(learning_rate=1.0, num_steps=8, schedule=schedule), s) for s in range(1, 9)]
        assert rates[0] == 1.0
        assert rates == sorted(rates, reverse=True)
        assert 0.0 < rates[-1] < 0.2


def test_exported_weights_hold_tied_tensors_once(folder: str) -> None:
    model = load_policy(folder)
    weights = named_weights(model)
    assert "lm_head.weight" not in weights
    assert sum(t.nbytes for t in weights.values()) == sum(p.nbytes for p in model.parameters())
    rounded = named_weights(model, torch.bfloat16)
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(t, weights[name].bfloat16()) for name, t in rounded.items())


def test_loaded_weights_outlive_their_file(folder: str, tmp_path: Path) -> None:
    """A memory-mapped weight would turn into a bus error when its file is cut."""
    tiny_model("qwen3").save_pretrained(tmp_path)
    model = load_policy(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_correction_takes_the_ratio_against_the_learner(folder: str) -> None:
    """Rollouts of a policy far away: without the correction the first update clips, with it nothing is clipped."""
    stale = [
        TrainSample(s.prompt, s.response, s.logprobs - np.float32(1.0), 1.0 + i) for i, s in enumerate(make_samples(5))
    ]
    plain = make_learner(folder).update(stale, 1)
    assert plain["actor/pg_clipfrac"] == pytest.approx(1.0)
    assert "rollout_corr/kl" not in plain
    corrected = make_learner(folder, max_staleness_steps=1).update(stale, 1)
    assert corrected["actor/pg_clipfrac"] == pytest.approx(0.0)
    assert corrected["actor/ppo_kl"] == pytest.approx(0.0, abs=1e-5)
    assert corrected["rollout_corr/kl"] == pytest.approx(-1.0, abs=1e-4)
    assert corrected["rollout_corr/rollout_is_mean"] == pytest.approx(2.0, abs=1e-4)
    assert corrected["training/rollout_logprobs_diff_mean"] == pytest.approx(1.0, abs=1e-4)
    # Every weight is the bound, 2: the loss is twice that of samples from the learner itself.
    fresh = [TrainSample(s.prompt, s.response, s.logprobs + np.float32(1.0), s.advantage) for s in stale]
    assert corrected["actor/pg_loss"] == pytest.approx(
        2 * make_learner(folder).update(fresh, 1)["actor/pg_loss"], rel=1e-4
    )


def test_a_step_of_rejected_samples_changes_nothing(folder: str) -> None:
    learner = make_learner(folder, correction=CorrectionConfig(rejection="sequence"))
    stale = [TrainSample(s.prompt, s.response, s.logprobs - np.float32(5.0), 1.0) for s in make_samples(6)]
    before = weights_of(learner)
    metrics = learner.update(stale, 1)
    assert metrics["actor/num_updates"] == 0
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == 1.0
    assert all(torch.equal(tensor, weights_of(learner)[name]) for name, tensor in before.items())


@pytest.mark.parametrize("loss", ["gspo", "cispo"])
def test_other_losses_move_towards_the_advantage(folder: str, loss: str) -> None:
    samples = [
        TrainSample(s.prompt, s.response, s.logprobs, 1.0 if i % 2 else -1.0) for i, s in enumerate(make_samples(1))
    ]
    learner = make_learner(folder, loss=loss, loss_agg="seq-mean-token-sum-norm", clip_ratio_high=9.0)
    logprobs = [learner._logprobs(samples)]
    learner.update(samples, step=1)
    logprobs.append(learner._logprobs(samples))
    gains = [after.mean() - before.mean() for before, after in zip(*logprobs, strict=True)]
    assert sum(gain * s.advantage for gain, s in zip(gains, samples, strict=True)) > 0


def test_dropout_is_the_same_after_a_restart(tmp_path: Path) -> None:
    """Nothing of torch's generators is saved: an update draws from one that is seeded with its step."""
    model = tiny_model("llama")
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path / "policy")
    samples = make_samples(1)
    straight = make_learner(str(tmp_path / "policy"))
    straight.update(samples, 1)
    straight.save(str(tmp_path / "saved"))
    straight.update(samples, 2)
    resumed = make_learner(str(tmp_path / "policy"))
    resumed.load(str(tmp_path / "saved"))
    torch.rand(3)
    resumed.update(samples, 2)
    plain = make_learner(str(tmp_path / "policy"))
    plain.load(str(tmp_path / "saved"))
    plain.update(samples, 3)
    expected, other = named_weights(straight._model), named_weights(plain._model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in named_weights(resumed._model).items())
    assert not all(torch.equal(tensor, expected[name]) for name, tensor in other.items()), "there is no dropout here"


def test_a_snapshot_is_the_state_of_its_moment(folder: str, tmp_path: Path) -> None:
    learner = make_learner(folder)
    learner.update(make_samples(1), 1)
    learner.save(str(tmp_path / "before"))
    learner.snapshot()
    learner.update(make_samples(2), 2)
    learner.save(str(tmp_path / "copy"))
    learner.save(str(tmp_path / "after"))
    for name in ("policy/model.safetensors", "optimizer.safetensors"):
        before, copy, after = ((tmp_path / where / name).read_bytes() for where in ("before", "copy", "after"))
        assert copy == before
        assert after != before

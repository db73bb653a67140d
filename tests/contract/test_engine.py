"""What every engine must do with every model family: same tokens with and without drafts, for every schedule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from slipstream.drafter.base import DraftBatch, HistoryRecord, LiveBatch, Price, Ragged
from slipstream.drafter.ngram import NgramDrafter
from slipstream.drafter.suffix import SuffixDrafter
from slipstream.rollout.budget import FixedBudget, PriceBudget
from slipstream.rollout.engine import Engine, EngineError
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid
from tests.tiny_models import FAMILIES, tiny_model

NUM_PROMPTS, NUM_SAMPLES, MAX_NEW = 6, 9, 80


def make_requests(temperature: float = 0.8, top_p: float = 1.0, top_k: int = 0, **sampling: object) -> list[Request]:
    rng = np.random.default_rng(11)
    out = []
    for group in range(NUM_PROMPTS):
        prompt = rng.integers(3, 96, size=int(rng.integers(1, 40))).astype(np.int32)
        for sample in range(NUM_SAMPLES):
            options = {"max_new_tokens": MAX_NEW, "seed": 5, "stop_token_ids": (2,)} | sampling
            drawn = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, **options)
            out.append(Request(request_uid(1, 0, group, sample), f"prompt-{group}", group, prompt, drawn))
    return out


def run(engine: TorchEngine, requests: list[Request]) -> dict[int, Rollout]:
    engine.submit(requests)
    rollouts = {rollout.request.uid: rollout for rollout in engine.drain(timeout_s=120)}
    assert set(rollouts) == {request.uid for request in requests}
    return rollouts


def assert_same(got: dict[int, Rollout], expected: dict[int, Rollout], atol: float = 1e-4) -> int:
    total = 0
    for uid, want in expected.items():
        np.testing.assert_array_equal(got[uid].tokens, want.tokens)
        np.testing.assert_allclose(got[uid].logprobs, want.logprobs, atol=atol)
        assert got[uid].finish == want.finish
        total += len(want.tokens)
    return total


def warm_suffix(rollouts: dict[int, Rollout]) -> SuffixDrafter:
    """A drafter that remembers these very rollouts: its drafts are right until siblings disagree."""
    drafter = SuffixDrafter()
    records = [HistoryRecord(r.request.prompt_id, 0, 0, r.tokens) for r in rollouts.values()]
    drafter.publish(0, records)
    return drafter


class NoisyDrafter(NgramDrafter):
    """Drafts for every row at every step; most tokens are wrong and some are not in the vocabulary."""

    def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
        rng = np.random.default_rng(int(batch.num_generated.sum()))
        for row in range(len(batch)):
            out.count[row] = price.max_draft[row]
            out.tokens[row] = rng.integers(-2, 97, size=out.tokens.shape[1])
            out.source[row] = 1


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[int, Rollout]]:
    return {family: run(TorchEngine(tiny_model(family), max_len=160), make_requests()) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_the_model_itself(family: str, plain: dict) -> None:
    """log p of every token equals a plain forward pass of transformers over the whole text."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    for rollout in list(plain[family].values())[::7]:
        prompt = rollout.request.prompt
        ids = torch.from_numpy(np.concatenate([prompt, rollout.tokens])).long()[None]
        with torch.inference_mode():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / 0.8
        expected = torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("products", ["fma", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_change_nothing_however_layers_multiply(products: str, dtype: torch.dtype) -> None:
    def make(**options: object) -> TorchEngine:
        return TorchEngine(tiny_model("qwen3").to(dtype), max_len=160, cpu_products=products, **options)

    engine = make()
    assert engine.kernels.products == products
    expected = run(engine, make_requests())
    for drafter in (warm_suffix(expected), NoisyDrafter()):
        drafting = make(drafter=drafter, budget=FixedBudget(9), max_live_requests=7)
        assert assert_same(run(drafting, make_requests()), expected, atol=0.0) >= 2000
        assert drafting.stats().drafted > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drafter", ["suffix", "warm", "ngram", "noisy"])
def test_drafts_change_nothing(family: str, drafter: str, plain: dict) -> None:
    expected = plain[family]
    drafters = {
        "suffix": SuffixDrafter(),
        "warm": warm_suffix(expected),
        "ngram": NgramDrafter(),
        "noisy": NoisyDrafter(),
    }
    engine = TorchEngine(tiny_model(family), max_len=160, drafter=drafters[drafter], budget=FixedBudget(9))
    got = run(engine, make_requests())
    assert assert_same(got, expected) >= 2000
    stats = engine.stats()
    assert stats.drafted > 0
    assert (stats.invalid_drafts > 0) == (drafter == "noisy")
    if drafter == "warm":
        assert stats.accepted > 0.3 * stats.generated_tokens
        assert stats.steps < MAX_NEW


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (1.0, 5)])
def test_identity_over_sampling_modes(temperature: float, top_p: float, top_k: int) -> None:
    requests = make_requests(temperature, top_p, top_k)
    expected = run(TorchEngine(tiny_model("qwen3"), max_len=160), requests)
    engine = TorchEngine(
        tiny_model("qwen3"),
        max_len=160,
        drafter=warm_suffix(expected),
        budget=PriceBudget(16),
        max_live_requests=7,
    )
    assert assert_same(run(engine, requests), expected) >= 2000 or temperature == 0.0
    assert engine.stats().accepted > 0


@pytest.mark.parametrize("max_live_requests", [1, 4, 13])
@pytest.mark.parametrize("order", ["given", "reversed", "shuffled"])
def test_identity_over_batches_and_orders(max_live_requests: int, order: str, plain: dict) -> None:
    requests = make_requests()
    if order == "reversed":
        requests.reverse()
    elif order == "shuffled":
        np.random.default_rng(0).shuffle(requests)
    engine = TorchEngine(tiny_model("qwen3"), max_len=160, max_live_requests=max_live_requests, max_forward_tokens=16)
    assert assert_same(run(engine, requests), plain["qwen3"]) >= 2000


def test_identity_over_kernels(plain: dict) -> None:
    engine = TorchEngine(tiny_model("qwen3"), max_len=160, kernels="reference")
    assert engine.kernels.name == "reference"
    assert assert_same(run(engine, make_requests()), plain["qwen3"]) >= 2000


def test_bits_do_not_depend_on_the_schedule(plain: dict) -> None:
    """On the CPU in float32 even the log-probabilities are equal to the bit."""
    engine = TorchEngine(
        tiny_model("qwen3"),
        max_len=160,
        max_live_requests=3,
        drafter=warm_suffix(plain["qwen3"]),
        budget=FixedBudget(7),
    )
    torch.set_num_threads(1)
    for uid, rollout in run(engine, make_requests()).items():
        np.testing.assert_array_equal(rollout.logprobs, plain["qwen3"][uid].logprobs)


def test_a_group_prefills_its_prompt_once(plain: dict) -> None:
    engine = TorchEngine(tiny_model("qwen3"), max_len=160, max_live_requests=4)
    requests = make_requests()
    run(engine, requests)
    prompts = {request.prompt_id: len(request.prompt) for request in requests if len(request.prompt) > 1}
    assert engine.stats().prefill_tokens == sum(prompts.values())


def test_finished_slots_are_refilled_at_once() -> None:
    engine = TorchEngine(tiny_model("qwen3"), max_len=160, max_live_requests=6)
    requests = make_requests()
    engine.submit(
        [
            dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_new_tokens=5 + i % 11))
            for i, r in enumerate(requests)
        ]
    )
    while engine.num_unfinished >= 6:
        before = engine.stats().live_sum
        engine.step()
        assert engine.stats().live_sum - before == 6


def test_prefill_continues_a_rollout(plain: dict) -> None:
    expected = plain["qwen3"]
    requests = []
    for request in make_requests():
        done = expected[request.uid].tokens
        cut = len(done) // 2
        requests.append(Request(request.uid, request.prompt_id, 0, request.prompt, request.sampling, done[:cut]))
    engine = TorchEngine(tiny_model("qwen3"), max_len=160, drafter=SuffixDrafter(), budget=FixedBudget(4))
    for uid, rollout in run(engine, requests).items():
        whole = np.concatenate([rollout.request.prefill, rollout.tokens])
        np.testing.assert_array_equal(whole, expected[uid].tokens)


def test_abort_returns_each_request_once() -> None:
    requests = make_requests()
    engine = TorchEngine(
        tiny_model("qwen3"), max_len=160, max_live_requests=4, drafter=SuffixDrafter(), budget=FixedBudget(4)
    )
    engine.submit(requests)
    out = engine.step() + engine.step()
    out += engine.abort([request.uid for request in requests[::2]] + [12345])
    out += engine.drain(timeout_s=60)
    assert sorted(r.request.uid for r in out) == sorted(r.uid for r in requests)
    assert sum(r.finish == "abort" for r in out) == len(requests[::2])


def test_bad_requests_come_back_with_a_reason_and_the_others_go_on() -> None:
    good = make_requests()[:2]
    sampling = good[0].sampling
    bad = [
        Request(1, "empty", 0, np.zeros(0, np.int32), sampling),
        Request(2, "long", 0, np.full(160, 5, np.int32), sampling),
        Request(3, "unknown", 0, np.array([4, 96], np.int32), sampling),
        Request(4, "negative", 0, np.array([4, -1], np.int32), sampling),
        Request(5, "full", 0, np.array([4], np.int32), sampling, np.full(MAX_NEW, 5, np.int32)),
    ]
    engine = TorchEngine(tiny_model("qwen3"), max_len=160)
    engine.submit(bad + good)
    rollouts = {r.request.uid: r for r in engine.drain(timeout_s=60)}
    for request, word in zip(bad, ("empty", "160 tokens", "token 96", "token -1", "leaves none"), strict=True):
        assert rollouts[request.uid].finish == "error"
        assert word in rollouts[request.uid].error
    assert all(rollouts[request.uid].finish in ("stop", "length") for request in good)
    with pytest.raises(EngineError, match="twice"):
        engine.submit([good[0], good[0]])


def test_nan_weights_fail_the_requests_not_the_engine() -> None:
    model = tiny_model("qwen3")
    engine = TorchEngine(model, max_len=160)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken = weights | {"model.norm.weight": torch.full_like(weights["model.norm.weight"], float("nan"))}
    engine.update_policy(broken, version=1)
    assert all("NaN" in rollout.error for rollout in run(engine, make_requests()[:3]).values())
    engine.update_policy(weights, version=2)
    rollout = next(iter(run(engine, make_requests()[:1]).values()))
    assert rollout.finish in ("stop", "length")
    assert set(rollout.policy_versions.tolist()) == {2}


def test_weight_updates_are_checked_and_take_effect(plain: dict) -> None:
    engine = TorchEngine(tiny_model("qwen3", seed=9), max_len=160)
    weights = tiny_model("qwen3").state_dict()
    for change, word in (
        ({"nonsense": torch.zeros(1)}, "nonsense"),
        ({"model.norm.weight": torch.zeros(3)}, "model.norm.weight"),
    ):
        with pytest.raises(EngineError, match=word):
            engine.update_policy(dict(weights) | change, version=1)
    with pytest.raises(EngineError, match="lack"):
        engine.update_policy({k: v for k, v in weights.items() if k != "model.norm.weight"}, version=1)
    engine.update_policy(weights, version=3)
    got = run(engine, make_requests())
    assert_same(got, plain["qwen3"])


def test_engine_settings_are_checked() -> None:
    with pytest.raises(EngineError, match="context of 256"):
        TorchEngine(tiny_model("qwen3"), max_len=4096)
    with pytest.raises(EngineError, match="max_forward_tokens=8"):
        TorchEngine(tiny_model("qwen3"), max_forward_tokens=8)
    assert isinstance(TorchEngine(tiny_model("qwen3")), Engine)


def test_extend_sees_every_token_once(plain: dict) -> None:
    seen: dict[int, list[int]] = {}

    class Listening(NgramDrafter):
        def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
            super().extend(batch, accepted)
            for row, uid in enumerate(batch.uids.tolist()):
                seen.setdefault(uid, []).extend(accepted.row(row).tolist())

    engine = TorchEngine(tiny_model("qwen3"), max_len=160, drafter=Listening(), budget=FixedBudget(3))
    for uid, rollout in run(engine, make_requests()).items():
        assert seen[uid] == rollout.tokens.tolist()

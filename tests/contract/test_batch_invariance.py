"""engine.batch_invariant: in bfloat16 a rollout has the same bits alone, in any batch, and with any draft."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from tests.triton_interpreter import DEVICE, make_rows_alike  # isort: skip

from slipstream.kernels.split_plan import plan_splits
from slipstream.rollout.batch_invariant import replace
from slipstream.rollout.budget import FixedBudget
from slipstream.rollout.engine import EngineError
from slipstream.rollout.graphs import StaticRunner
from slipstream.rollout.static_step import SplitPolicy
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout, Sampling
from tests.contract.test_engine import run, warm_suffix
from tests.tiny_models import FAMILIES, tiny_model


def requests(lengths: tuple[int, ...]) -> list[Request]:
    sampling = Sampling(3, temperature=1.0, seed=5)
    return [
        Request(i, f"p{i}", i, np.random.default_rng(i).integers(3, 96, length).astype(np.int32), sampling)
        for i, length in enumerate(lengths)
    ]


def replace_sampling(request: Request, max_new_tokens: int) -> Request:
    return dataclasses.replace(request, sampling=Sampling(max_new_tokens, temperature=1.0, seed=5))


def engine(family: str, **options: object) -> TorchEngine:
    model = tiny_model(family).to(DEVICE, torch.bfloat16)
    return TorchEngine(model, max_len=200, kernels="triton", batch_invariant=True, **options)


# The long prompts are such that splits of the keys which follow the batch would cut them at other places.
@pytest.mark.parametrize("lengths", [(7, 2), pytest.param((150, 131), marks=pytest.mark.slow)])
def test_bits_depend_on_neither_batch_nor_drafts(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    make_rows_alike(monkeypatch)
    family, wanted = "qwen3", requests(lengths)
    alone: dict[int, Rollout] = {}
    for request in wanted[:1]:
        alone |= run(engine(family, max_live_requests=1), [request])
    together = engine(family, max_live_requests=2, drafter=warm_suffix(alone), budget=FixedBudget(2))
    got = run(together, wanted)
    assert together.stats().accepted > 0
    for uid, rollout in alone.items():
        np.testing.assert_array_equal(got[uid].tokens, rollout.tokens)
        np.testing.assert_array_equal(got[uid].logprobs, rollout.logprobs)


@pytest.mark.parametrize("invariant", [True, False])
def test_splits_of_the_keys_do_not_follow_the_batch(invariant: bool) -> None:
    policy = SplitPolicy(programs=528, heads=2, batch_invariant=invariant)
    split_keys = [policy.split_keys(keys) for keys in (100, 5_000, 1_000_000)]
    assert (len(set(split_keys)) == 1) == invariant
    for contexts in ([40_000], [40_000, 3, 600], [7] * 64):
        widths = np.full(len(contexts), 8)
        ends = np.array(contexts) + widths
        plan = plan_splits(np.array(contexts), widths, np.zeros_like(widths), policy.split_keys(int(ends.sum())))
        assert len(plan.work) <= policy.capacity(len(contexts), len(plan.work))


def test_the_engine_hands_the_switch_on() -> None:
    switched = engine("qwen3")
    assert isinstance(switched.runner, StaticRunner)
    assert switched.runner.batch_invariant
    linears = [module for module in switched.model.modules() if isinstance(module, nn.Linear)]
    assert all("forward" in vars(module) for module in linears)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_the_replaced_model_computes_the_same(family: str) -> None:
    """In float32, against the model's own layers; weights copied in later take effect."""
    ids = torch.arange(5, 17, device=DEVICE)[None]
    plain, patched = tiny_model(family).to(DEVICE), tiny_model(family, seed=3).to(DEVICE)
    for name, module in patched.named_modules():
        replace(name, module, "reference" if DEVICE == "cpu" else "triton")
    assert any("forward" in vars(module) for module in patched.modules() if isinstance(module, nn.Linear))
    assert any("forward" in vars(module) for module in patched.modules() if "RMSNorm" in type(module).__name__)
    patched.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(patched(ids).logits, plain(ids).logits, atol=1e-3, rtol=1e-4)


class OddRMSNorm(nn.Module):
    """A name that promises more than the layer keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (1 + x.abs().mean(-1, keepdim=True))


def test_layers_that_cannot_keep_the_promise_are_named() -> None:
    with pytest.raises(EngineError, match=r"layer model\.layers\.0.* sums over .* in an order of its own"):
        engine("mixtral")
    with pytest.raises(EngineError, match=r"layer model\.layers\.0.* sums over .* in an order of its own"):
        TorchEngine(tiny_model("mixtral"), kernels="native", batch_invariant=True)
    with pytest.raises(EngineError, match=r"norm odd \(OddRMSNorm\) is no RMS norm we know"):
        replace("odd", OddRMSNorm(), "reference")
    with pytest.raises(EngineError, match="batch_invariant=true with reference kernels"):
        TorchEngine(tiny_model("qwen3"), kernels="reference", batch_invariant=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_kernels_need_nothing_more(dtype: torch.dtype) -> None:
    def native(**options: object) -> TorchEngine:
        model = tiny_model("qwen3").to(dtype)
        return TorchEngine(model, max_len=200, kernels="native", batch_invariant=True, **options)

    wanted = [replace_sampling(request, 24) for request in requests((7, 2, 40))]
    alone: dict[int, Rollout] = {}
    for request in wanted:
        alone |= run(native(max_live_requests=1), [request])
    together = native(max_live_requests=3, drafter=warm_suffix(alone), budget=FixedBudget(7))
    got = run(together, wanted)
    assert together.stats().accepted > 0
    for uid, rollout in alone.items():
        np.testing.assert_array_equal(got[uid].tokens, rollout.tokens)
        np.testing.assert_array_equal(got[uid].logprobs, rollout.logprobs)

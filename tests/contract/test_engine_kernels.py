"""Law 1 on every kernel path: the same tokens from C++, the plain twins and Triton, packed or over static buffers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.triton_interpreter import DEVICE  # isort: skip

from slipstream.drafter.base import DraftBatch, LiveBatch, Price, Ragged
from slipstream.drafter.ngram import NgramDrafter
from slipstream.kernels.dispatch import KernelError, select
from slipstream.kernels.reference import SamplingRows
from slipstream.rollout.budget import FixedBudget
from slipstream.rollout.engine import EngineError
from slipstream.rollout.graphs import Capture, Pass, StaticRunner
from slipstream.rollout.packing import StepPlan
from slipstream.rollout.runners import PackedRunner
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid
from tests.contract.test_engine import NoisyDrafter, assert_same, make_requests, run, warm_suffix
from tests.tiny_models import tiny_model

PATHS = ("native", "reference", "triton") if DEVICE == "cpu" else ("reference", "triton")
SAMPLING = ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5})


def few_requests(max_new_tokens: int = 4, top: bool = True) -> list[Request]:
    """A short and a long prompt, two samples each; the long one is wider than one pass of the engines below."""
    rng, out = np.random.default_rng(3), []
    for group, length in enumerate((3, 37)):
        prompt = rng.integers(3, 96, size=length).astype(np.int32)
        for sample in range(2):
            knobs = {"temperature": 0.8} | (SAMPLING[2 * group + sample] if top else {})
            sampling = Sampling(max_new_tokens, seed=5, stop_token_ids=(2,), **knobs)
            out.append(Request(request_uid(1, 0, group, sample), f"p{group}", group, prompt, sampling))
    return out


def make_engine(family: str = "qwen3", **options: object) -> TorchEngine:
    defaults: dict = {"max_len": 64, "max_forward_tokens": 24, "max_live_requests": 4}
    return TorchEngine(tiny_model(family).to(DEVICE), **(defaults | options))


def make_static(engine: TorchEngine, capture: Capture | None = None) -> StaticRunner:
    """The engine goes on over static buffers, whatever its kernels."""
    spare = engine.cache.num_slots - 1
    engine.runner = runner = StaticRunner(
        engine.model, engine.cache, engine.kernels, spare_slot=spare, max_requests=spare, capture=capture
    )
    return runner


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[int, Rollout]]:
    return {family: run(make_engine(family, kernels="reference"), few_requests()) for family in ("qwen3", "gemma2")}


@pytest.mark.parametrize(
    ("kernels", "products"),
    [*((path, "fma") for path in PATHS), *((path, "tiles") for path in PATHS if path == "native")],
)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_every_path_draws_the_same_tokens(kernels: str, products: str, family: str, plain: dict) -> None:
    """Drafts that are right, drafts that are wrong, top-k, top-p, greedy, prompts in chunks, refilled slots."""
    expected = plain[family]
    drafter = warm_suffix(expected) if family == "qwen3" else NoisyDrafter()
    options = {"kernels": kernels, "cpu_products": products, "max_live_requests": 3}
    engine = make_engine(family, drafter=drafter, budget=FixedBudget(3), **options)
    assert engine.kernels.name == kernels
    assert kernels != "native" or engine.kernels.products == products
    assert assert_same(run(engine, few_requests()), expected) >= 12
    assert engine.stats().drafted > 0
    assert engine.stats().shared_prompt_tokens == 2 + 36
    assert engine.stats().copied_prompt_tokens == 0


def test_an_engine_says_how_it_runs_its_steps() -> None:
    assert "reference kernels sample on the host" in make_engine(kernels="reference").runner_reason
    said = make_engine(kernels="triton", cuda_graphs=False).runner_reason
    assert said.startswith("static steps, no CUDA graphs: ")
    assert ("the model is on cpu" in said) == (DEVICE == "cpu")


@pytest.mark.parametrize("max_live_requests", [1, 5, 54])
def test_static_buffers_change_nothing(max_live_requests: int) -> None:
    """The padding and bucketing alone, at many sizes: plain kernels under the static runner and without it."""
    requests = make_requests()[::3]
    expected = run(make_engine(kernels="reference", max_len=160, max_forward_tokens=600), requests)
    engine = make_engine(
        kernels="reference",
        max_len=160,
        max_live_requests=max_live_requests,
        max_forward_tokens=600,
        drafter=warm_suffix(expected),
        budget=FixedBudget(40),
        max_draft_tokens=40,
    )
    runner = make_static(engine)
    assert assert_same(run(engine, requests), expected) > 700
    assert runner.stats.eager == engine.stats().steps
    assert engine.stats().accepted > 100


def replaying() -> tuple[Capture, list[Pass]]:
    """A stand-in for CUDA graphs where there is no GPU: a replay is the pass again, on what its buffers then hold."""
    captured: list[Pass] = []

    def capture(run: Pass) -> Pass:
        captured.append(run)
        return run

    return capture, captured


def refuse(_: Pass) -> Pass:
    raise torch.OutOfMemoryError("out of memory: tried to allocate 1 GiB")


@pytest.mark.parametrize("capture", [replaying()[0], refuse])
def test_graphs_are_made_at_the_second_pass_and_outlive_the_weights(
    capture: Callable[[Pass], Pass], caplog: pytest.LogCaptureFixture
) -> None:
    requests = few_requests(max_new_tokens=3, top=False)[:1]
    engine = make_engine(kernels="triton", max_live_requests=1)
    runner = make_static(engine, capture)
    weights = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        first = run(engine, requests)
        engine.update_policy({name: 0.5 * tensor for name, tensor in weights.items()}, version=1)
        run(engine, requests)
        engine.update_policy(weights, version=2)
        again = run(engine, requests)
    for uid, rollout in first.items():
        np.testing.assert_array_equal(again[uid].tokens, rollout.tokens)
    said = [record.message for record in caplog.records]
    if capture is refuse:
        assert (runner.stats.captured, runner.stats.replayed) == (0, 0)
        assert len(runner.stats.refused) == 1
        assert len(said) == 1
        assert "1 requests, 1 tokens" in said[0]
        assert "tried to allocate" in said[0]
    else:
        assert (runner.stats.captured, len(runner.stats.refused), said) == (1, 0, [])
        assert engine.stats().graph_steps == runner.stats.replayed
        assert runner.stats.replayed == engine.stats().steps - runner.stats.eager > runner.stats.eager


@pytest.mark.parametrize("budget", [0, 3])
def test_the_drafter_learns_while_the_device_works(budget: int, plain: dict) -> None:
    """Beside a device the drafter hears of a pass once the next is under way, or before it is asked for drafts."""
    events: list[str] = []

    class Telling(NgramDrafter):
        def propose(self, batch: LiveBatch, price: Price, out: DraftBatch) -> None:
            events.append("propose")
            super().propose(batch, price, out)

        def extend(self, batch: LiveBatch, accepted: Ragged) -> None:
            events.append("extend")
            super().extend(batch, accepted)

        def end(self, uid: int, finished: bool) -> None:
            events.append("end")
            super().end(uid, finished)

    class Launching(PackedRunner):
        def launch(self, plan: StepPlan, rows: SamplingRows) -> None:
            events.append("launch")
            super().launch(plan, rows)

    engine = make_engine(kernels="reference", drafter=Telling(), budget=FixedBudget(budget))
    engine.runner = Launching(engine.model, engine.cache, engine.kernels)
    engine.runner.overlaps = True
    request = few_requests()[0]
    got = run(engine, [request])
    np.testing.assert_array_equal(got[request.uid].tokens, plain["qwen3"][request.uid].tokens)
    later = ["extend", "propose", "launch"] if budget else ["launch", "extend"]
    assert events[: 1 + 2 * len(later)] == ["launch", *later, *later]
    assert events[-2:] == ["extend", "end"]
    assert events.count("extend") == events.count("launch")


def test_bad_logits_fail_on_the_device_too() -> None:
    model = tiny_model("llama").to(DEVICE)
    engine = TorchEngine(model, max_len=64, kernels="triton", max_live_requests=2)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Of one token only: the requests that never see it go on.
    weights["model.embed_tokens.weight"][50] = torch.nan
    engine.update_policy(weights, version=1)
    sampling = Sampling(2, seed=5)
    prompts = (np.array([4, 50], np.int32), np.array([4, 51], np.int32))
    requests = [Request(i, f"p{i}", i, prompt, sampling) for i, prompt in enumerate(prompts)]
    got = run(engine, requests)
    assert got[0].finish == "error"
    assert "NaN" in got[0].error
    assert got[1].finish == "length"


def test_what_cannot_run_is_refused_by_name() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"engine\.kernels is 'cuda'; allowed: auto, native, triton, reference"):
        select("cuda", cpu, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=r"engine\.kernels=native: .*float16"):
        select("native", cpu, torch.float16)
    assert select("auto", cpu, torch.float32).name == "native"
    assert select("auto", torch.device("cuda"), torch.bfloat16).name == "triton"
    reference_engine = make_engine(kernels="reference")
    with pytest.raises(KernelError, match="graphs need kernels that sample on the device, not reference"):
        make_static(reference_engine, refuse)


def test_a_vocabulary_above_the_samplers_limit_is_refused() -> None:
    model = tiny_model("qwen3").to(DEVICE)
    model.config.vocab_size = 2**20 + 1
    with pytest.raises(EngineError, match="1048577 tokens; the sampling kernel takes up to 1048576"):
        TorchEngine(model, max_len=64, kernels="triton")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", PATHS)
def test_compiled_layers_change_nothing(kernels: str, plain: dict) -> None:
    """engine.compile: our cache and attention stay outside of what torch compiles."""
    engine = make_engine(kernels=kernels, compile=True)
    assert_same(run(engine, few_requests()), plain["qwen3"])

"""On a GPU: graphs replay what eager passes compute, weights move under them, and batch invariance holds to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slipstream.experiments.rollout_speed.presets import make_model
from slipstream.rollout.budget import FixedBudget
from slipstream.rollout.graphs import StaticRunner
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout, Sampling
from tests.contract.test_engine import assert_same, make_requests, run, warm_suffix
from tests.tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.gpu


def cuda_engine(family: str, dtype: torch.dtype = torch.float32, **options: object) -> TorchEngine:
    return TorchEngine(tiny_model(family).to("cuda", dtype), max_len=160, kernels="triton", **options)


def graph_stats(engine: TorchEngine) -> tuple[int, int]:
    assert isinstance(engine.runner, StaticRunner)
    return engine.runner.stats.replayed, len(engine.runner.stats.refused)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_graphs_draw_the_tokens_of_the_cpu(family: str) -> None:
    """Float32 on both sides; the noise is one stream, so tokens differ at floating-point ties only."""
    requests = make_requests()[::3]
    expected = run(TorchEngine(tiny_model(family), max_len=160, kernels="reference"), requests)
    engine = cuda_engine(family, drafter=warm_suffix(expected), budget=FixedBudget(9))
    got = run(engine, requests)
    replayed, refused = graph_stats(engine)
    assert refused == 0
    assert replayed > engine.stats().steps // 4
    assert engine.stats().graph_steps == replayed
    different = sum(not np.array_equal(got[uid].tokens, expected[uid].tokens) for uid in expected)
    assert different <= 1


def test_graphs_equal_eager_passes_before_and_after_an_update() -> None:
    requests = make_requests()[::2]
    graphed, eager = cuda_engine("qwen3"), cuda_engine("qwen3", cuda_graphs=False)
    assert_same(run(graphed, requests), run(eager, requests), atol=0.0)
    weights = {name: 0.9 * tensor for name, tensor in graphed.model.state_dict().items()}
    before = graph_stats(graphed)[0]
    for engine in (graphed, eager):
        engine.update_policy(weights, version=1)
    assert_same(run(graphed, requests), run(eager, requests), atol=0.0)
    assert graph_stats(graphed)[0] > before
    assert graph_stats(eager) == (0, 0)


def test_batch_invariance_to_the_bit_in_bfloat16() -> None:
    """A model of real widths: products of many tiles, attention of several splits."""
    device = torch.device("cuda")
    rng = np.random.default_rng(0)
    sampling = Sampling(48, temperature=0.3, seed=5)
    prompts = [rng.integers(3, 1000, length).astype(np.int32) for length in (900, 70, 1300, 5)]
    requests = [Request(i, f"p{i}", i, prompt, sampling) for i, prompt in enumerate(prompts)]

    def engine(**options: object) -> TorchEngine:
        model = make_model("qwen3_0.6b", torch.bfloat16, device)
        return TorchEngine(model, max_len=1500, kernels="triton", batch_invariant=True, **options)

    alone: dict[int, Rollout] = {}
    single = engine(max_live_requests=1)
    for request in requests:
        alone |= run(single, [request])
    together = engine(max_live_requests=4, drafter=warm_suffix(alone), budget=FixedBudget(7))
    got = run(together, requests)
    assert together.stats().accepted > 0
    for uid, rollout in alone.items():
        np.testing.assert_array_equal(got[uid].tokens, rollout.tokens)
        np.testing.assert_array_equal(got[uid].logprobs, rollout.logprobs)

"""Stepping in the background: same tokens as without, and what a change of weights does to the requests in flight."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from slipstream.rollout.engine import EngineError
from slipstream.rollout.stepper import EngineStepper, InFlight
from slipstream.rollout.torch_engine import TorchEngine
from slipstream.rollout.types import Request, Rollout, Sampling, request_uid
from tests.tiny_models import tiny_model

DEADLINE_S = 60.0
LONG = 120


def make_engine(seed: int = 0, live: int = 4) -> TorchEngine:
    return TorchEngine(tiny_model("qwen3", seed), max_live_requests=live, max_len=200, max_forward_tokens=64)


def make_requests(num: int, num_tokens: int = LONG) -> list[Request]:
    rng = np.random.default_rng(3)
    return [
        Request(request_uid(7, 0, i, 0), f"p{i}", i, rng.integers(3, 96, 5 + i).astype(np.int32), Sampling(num_tokens))
        for i in range(num)
    ]


@pytest.fixture
def engine() -> TorchEngine:
    return make_engine()


@pytest.fixture
def stepper(engine: TorchEngine) -> Iterator[EngineStepper]:
    stepper = EngineStepper(engine, num_threads=1)
    yield stepper
    stepper.close()


def collect(stepper: EngineStepper, num: int) -> dict[int, Rollout]:
    out: list[Rollout] = []
    until = time.monotonic() + DEADLINE_S
    while len(out) < num and time.monotonic() < until:
        out += stepper.poll(0.5)
    assert len(out) == num
    assert stepper.poll(0.0) == [], "a rollout was handed out twice"
    return {rollout.request.uid: rollout for rollout in out}


def wait_for_tokens(stepper: EngineStepper, engine: TorchEngine, num: int) -> None:
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        if stepper.call(lambda: engine.stats().generated_tokens, "a look", DEADLINE_S) >= num:
            return
    raise AssertionError(f"no {num} tokens within {DEADLINE_S} s")


def test_tokens_are_those_of_a_drained_engine(stepper: EngineStepper) -> None:
    requests = make_requests(6, 30)
    plain = make_engine()
    plain.submit(requests)
    expected = {rollout.request.uid: rollout.tokens.tolist() for rollout in plain.drain(DEADLINE_S)}
    for request in requests:
        stepper.submit([request], DEADLINE_S)
    assert {uid: rollout.tokens.tolist() for uid, rollout in collect(stepper, 6).items()} == expected
    assert stepper.busy_s > 0


@pytest.mark.parametrize("in_flight", ["continue", "recompute"])
def test_live_requests_go_on_under_the_new_weights(
    stepper: EngineStepper, engine: TorchEngine, in_flight: InFlight
) -> None:
    """recompute equals a fresh request that carries the old tokens on; continue does not, as its cache is older."""
    requests, newer = make_requests(3), tiny_model("qwen3", seed=1).state_dict()
    stepper.submit(requests, DEADLINE_S)
    wait_for_tokens(stepper, engine, 60)
    assert stepper.update_policy(lambda: engine.update_policy(newer, 5), 5, in_flight, DEADLINE_S) == 5
    rollouts = collect(stepper, 3)
    same = []
    for request in requests:
        rollout = rollouts[request.uid]
        versions = rollout.policy_versions.tolist()
        switch = versions.index(5)
        assert 0 < switch < LONG
        assert versions == [0] * switch + [5] * (LONG - switch)
        fresh = make_engine(seed=1)
        continued = Request(
            request.uid, request.prompt_id, 0, request.prompt, request.sampling, prefill=rollout.tokens[:switch]
        )
        fresh.submit([continued])
        [expected] = fresh.drain(DEADLINE_S)
        same.append(expected.tokens.tolist() == rollout.tokens[switch:].tolist())
    assert all(same) if in_flight == "recompute" else not all(same)


def test_drain_gives_every_rollout_one_version(stepper: EngineStepper, engine: TorchEngine) -> None:
    """Eight requests, four slots: the live ones end under the old weights, the queued ones start under the new."""
    newer = tiny_model("qwen3", seed=1).state_dict()
    stepper.submit(make_requests(8), DEADLINE_S)
    wait_for_tokens(stepper, engine, 20)
    stepper.update_policy(lambda: engine.update_policy(newer, 5), 5, "drain", DEADLINE_S)
    versions = [set(rollout.policy_versions.tolist()) for rollout in collect(stepper, 8).values()]
    assert sorted(map(sorted, versions)) == [[0]] * 4 + [[5]] * 4


def test_aborted_requests_come_back_with_what_they_have(stepper: EngineStepper, engine: TorchEngine) -> None:
    requests = make_requests(5)
    stepper.submit(requests, DEADLINE_S)
    wait_for_tokens(stepper, engine, 8)
    stepper.abort([requests[0].uid, requests[4].uid], DEADLINE_S)
    rollouts = collect(stepper, 5)
    assert [rollouts[request.uid].finish for request in requests] == ["abort", "length", "length", "length", "abort"]


@pytest.mark.parametrize("in_flight", ["continue", "recompute", "drain"])
def test_a_call_that_fails_leaves_the_engine_running(
    stepper: EngineStepper, engine: TorchEngine, in_flight: InFlight
) -> None:
    broken = {"model.norm.weight": engine.model.state_dict()["model.norm.weight"]}
    with pytest.raises(EngineError, match="lack"):
        stepper.update_policy(lambda: engine.update_policy(broken, 1), 1, in_flight, DEADLINE_S)
    stepper.submit(make_requests(1, 3), DEADLINE_S)
    collect(stepper, 1)


def test_a_failing_engine_is_every_callers_error(stepper: EngineStepper, engine: TorchEngine) -> None:
    engine.model.forward = None  # type: ignore[assignment]
    stepper.submit(make_requests(1), DEADLINE_S)
    with pytest.raises(EngineError, match="the engine failed: TypeError"):
        stepper.poll(DEADLINE_S)
    with pytest.raises(EngineError, match="the engine failed"):
        stepper.submit(make_requests(1), DEADLINE_S)


def test_a_deadline_names_what_was_waited_for(stepper: EngineStepper) -> None:
    stepper.submit(make_requests(2), DEADLINE_S)
    with pytest.raises(
        EngineError, match=r"history of step 3: waited 0.05 s for the engine's thread \(\d requests live"
    ):
        stepper.call(lambda: time.sleep(1.0), "history of step 3", 0.05)

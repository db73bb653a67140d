"""The pool of rollout workers: Ray actors, routing, deadlines.

Invariants
- Every request handed to `generate` comes back exactly once, or PoolError says which worker failed.
- Requests are dealt longest predicted first to the least loaded worker; where they run changes no token.
- Every wait has a deadline, and the error names who was waited for.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from slipstream.drafter.base import HistoryRecord
from slipstream.rollout.acceptance import AcceptanceModel
from slipstream.rollout.engine import EngineError, EngineStats
from slipstream.rollout.types import Request, Rollout
from slipstream.rollout.worker import GenerateResult, RolloutWorker, WorkerSpec

Routing = Literal["sample", "group"]
WATCH_GROUP = "watch"
"""Calls of this concurrency group have a thread of their own: they are answered while everything else is stuck."""


class PoolError(EngineError):
    """A worker died, failed or did not answer in time; the message names it and what was asked."""


class PoolTimeout(PoolError):
    """A deadline passed."""


@dataclass(frozen=True, slots=True)
class PoolResult:
    """Rollouts in the order of the requests; of each worker, the engine's totals, its busy seconds and what it observed
    of its drafts."""

    rollouts: list[Rollout]
    stats: list[EngineStats]
    busy_s: list[float]
    acceptance: list[AcceptanceModel]


def assign_requests(
    requests: Sequence[Request], predicted: Mapping[str, float], num_workers: int, routing: Routing
) -> list[list[Request]]:
    """Deals requests to workers: longest predicted first, each to the worker with the least predicted tokens.

    routing: `sample` deals single requests, so that a long prompt's samples share the workers evenly; `group` keeps a
    group together, so that its prompt is prefilled once and all its siblings draft from each other. predicted: expected
    response tokens per prompt_id; unknown prompts count as the mean of the known ones. Pure and deterministic.
    """
    units: dict[int, list[Request]] = defaultdict(list)
    for i, request in enumerate(requests):
        units[request.group if routing == "group" else i].append(request)
    fallback = sum(predicted.values()) / len(predicted) if predicted else 1.0
    ranked = sorted(units.values(), key=lambda unit: -predicted.get(unit[0].prompt_id, fallback))
    dealt: list[list[Request]] = [[] for _ in range(num_workers)]
    load = [0.0] * num_workers
    for unit in ranked:
        worker = min(range(num_workers), key=load.__getitem__)
        dealt[worker] += unit
        load[worker] += predicted.get(unit[0].prompt_id, fallback) * len(unit)
    return dealt


def wait_for(refs: Sequence[Any], names: Sequence[str], what: str, timeout_s: float) -> list[Any]:
    """ray.get with a deadline; PoolError or PoolTimeout names the first actor that did not deliver."""
    try:
        return ray.get(list(refs), timeout=timeout_s)
    except GetTimeoutError:
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        late = [name for ref, name in zip(refs, names, strict=True) if ref not in done]
        raise PoolTimeout(f"{what}: waited {timeout_s:g} s for {', '.join(late)}") from None
    except RayActorError as error:
        reason = " ".join(str(error).split())[:300]
        raise PoolError(f"{what}: an actor died ({', '.join(names)}): {reason}") from error
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise PoolError(f"{what}: {type(cause).__name__}: {cause}") from error


def make_actor(cls: type, num_cpus: float, num_gpus: float, max_concurrency: int = 1) -> Any:
    """A Ray actor class whose instances answer calls of WATCH_GROUP whatever else they do."""
    # Any: ray's types know neither concurrency groups nor the methods that exist at run time only.
    remote: Any = ray.remote
    groups = {WATCH_GROUP: 1}
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_concurrency": max_concurrency}
    return remote(**options, concurrency_groups=groups)(cls)


def dump_stacks(actors: Mapping[str, Any], timeout_s: float) -> dict[str, str]:
    """Asks actors that have a method `stacks` for their threads' stacks. Never raises, never waits longer."""
    refs = {name: actor.stacks.options(concurrency_group=WATCH_GROUP).remote() for name, actor in actors.items()}
    done, _ = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
    out = {}
    for name, ref in refs.items():
        try:
            out[name] = ray.get(ref) if ref in done else f"no answer within {timeout_s:g} s: stopped, dead or in C code"
        except RayError as error:
            out[name] = " ".join(str(error).split())[:300]
    return out


class RolloutPool:
    """`num_workers` Ray actors with the same spec."""

    actor_class: type[RolloutWorker] = RolloutWorker
    max_concurrency = 1

    def __init__(
        self, spec: WorkerSpec, num_workers: int, num_cpus: float, num_gpus: float, routing: Routing = "sample"
    ) -> None:
        self._routing = routing
        actor = make_actor(self.actor_class, num_cpus, num_gpus, self.max_concurrency)
        self._workers: list[Any] = [actor.remote(spec) for _ in range(num_workers)]
        self._names = [f"rollout worker {i}" for i in range(num_workers)]

    def ready(self, timeout_s: float) -> list[dict[str, Any]]:
        """Waits until every worker has loaded its model; what each reports about itself."""
        return wait_for([w.ready.remote() for w in self._workers], self._names, "start", timeout_s)

    def share_indexes(self, timeout_s: float) -> int:
        """On every node with several workers, one builds the drafter's index and the others map it: before the first
        request. Returns how many workers map."""
        node_of = wait_for([w.node_id.remote() for w in self._workers], self._names, "sharing the index", timeout_s)
        num_readers = 0
        for node in dict.fromkeys(node_of):
            builder, *readers = [i for i, other in enumerate(node_of) if other == node]
            if not readers:
                continue
            opened = self._workers[builder].open_shared_folder.remote()
            path = wait_for([opened], [self._names[builder]], "sharing the index", timeout_s)[0]
            if path is None:
                continue
            refs = [self._workers[i].join_shared_folder.remote(path) for i in readers]
            wait_for(refs, [self._names[i] for i in readers], "sharing the index", timeout_s)
            num_readers += len(readers)
        return num_readers

    def dump_stacks(self, timeout_s: float) -> dict[str, str]:
        """The stacks of all threads of every worker, by name; who does not answer in time is said so."""
        return dump_stacks(dict(zip(self._names, self._workers, strict=True)), timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Lets the workers remove what they put into shared memory; one that does not answer in time is left alone."""
        # Tidying up must not hide why the job ends.
        with contextlib.suppress(RayError):
            refs = [worker.close.remote() for worker in self._workers]
            ray.wait(refs, num_returns=len(refs), timeout=timeout_s)

    def generate(
        self,
        requests: Sequence[Request],
        predicted: Mapping[str, float],
        timeout_s: float,
        speculate: bool = True,
    ) -> PoolResult:
        """Runs the requests to their end on all workers."""
        dealt = assign_requests(requests, predicted, len(self._workers), self._routing)
        refs = [
            worker.generate.remote(share, speculate, timeout_s)
            for worker, share in zip(self._workers, dealt, strict=True)
        ]
        results: list[GenerateResult] = wait_for(refs, self._names, "rollouts", timeout_s)
        by_uid = {rollout.request.uid: rollout for result in results for rollout in result.rollouts}
        lost = [request.uid for request in requests if request.uid not in by_uid]
        if lost:
            raise PoolError(f"rollouts: {len(lost)} of {len(requests)} requests did not come back, first uid {lost[0]}")
        return PoolResult(
            [by_uid[request.uid] for request in requests],
            [result.stats for result in results],
            [result.seconds for result in results],
            [result.acceptance for result in results],
        )

    def update_policy(self, weights: Any, version: int, timeout_s: float) -> None:
        """weights: a mapping of tensors, or a Ray object reference to one. Every worker serves `version` after."""
        refs = [worker.update_policy.remote(weights, version) for worker in self._workers]
        served = wait_for(refs, self._names, f"weights of version {version}", timeout_s)
        if set(served) != {version}:
            raise PoolError(f"weights: workers serve versions {served}, expected {version}")

    def publish(
        self, step: int, records: list[HistoryRecord], acceptance: AcceptanceModel | None, timeout_s: float
    ) -> None:
        """Ships the step's finished rollouts to every worker once; their drafters roll their windows.

        acceptance: what all workers together have observed of their drafts.
        """
        shared = ray.put(records)
        refs = [worker.publish.remote(step, shared, acceptance) for worker in self._workers]
        wait_for(refs, self._names, f"history of step {step}", timeout_s)

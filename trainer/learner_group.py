"""The learners as one: Ray actors that get every call together, and answer or fail together.

Invariants
- Every call goes to all learners with the same arguments; the answer is rank 0's.
- Every wait has a deadline. One learner that dies or raises ends the call at once with a line that names it, although
  the others may wait for it for ever; the group is killed then, because learners that were left in the middle of an
  exchange cannot be spoken to again. A learner that is alone is spared: a full disk is no reason to lose it.
- The driver never holds weights.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from slipstream.conf.schema import ClusterConfig
from slipstream.rollout.actors import SAVE_GROUP, WATCH_GROUP, PoolError, PoolTimeout, make_actor
from slipstream.rollout.placement import Placement
from slipstream.trainer.batch import TrainSample
from slipstream.trainer.policy import LearnerSpec, PolicyLearner, learner_names

PEERS_S = 5.0
"""How long the others have to fail as well: who lost a connection is heard of before who died."""
ALIVE_S = 3.0
"""How long a late learner has to answer anything at all."""


class LearnerCall:
    """One call to learners, under way since it was made. refs: by name, the one whose answer counts first."""

    def __init__(self, group: LearnerGroup, what: str, refs: dict[str, Any], timeout_s: float) -> None:
        self._group, self.what, self._timeout_s = group, what, timeout_s
        self._refs = refs
        self._checked: set[str] = set()
        self.deadline = time.monotonic() + timeout_s

    @property
    def ref(self) -> Any:
        """Of rank 0's answer, for calls that take it."""
        return next(iter(self._refs.values()))

    def pending(self) -> tuple[Any, ...]:
        """What has not come yet. PoolError, which names the learner, once one has failed."""
        done, open_refs = ray.wait(list(self._refs.values()), num_returns=len(self._refs), timeout=0)
        for name, ref in self._refs.items():
            if ref in done and name not in self._checked:
                self._checked.add(name)
                try:
                    ray.get(ref)
                except RayError:
                    self._fail()
        return tuple(open_refs)

    def result(self) -> Any:
        """Waits; rank 0's answer. PoolTimeout, which names the late, at the deadline."""
        while pending := self.pending():
            left = self.deadline - time.monotonic()
            if left <= 0:
                late = ", ".join(name for name, ref in self._refs.items() if ref in pending)
                silent = ", ".join(self._group.silent())
                self._group.close()
                line = f"{self.what}: waited {self._timeout_s:g} s for {late}"
                raise PoolTimeout(f"{line}; no answer from {silent}" if silent else line)
            ray.wait(list(pending), num_returns=1, timeout=left)
        return ray.get(self.ref)

    def _fail(self) -> None:
        """Ends the group with the likeliest cause: a death rather than an error, which may be a lost connection."""
        until, failed = time.monotonic() + PEERS_S, self._failed()
        while time.monotonic() < until and len(failed) < len(self._refs):
            if any(isinstance(error, RayActorError) for error in failed.values()):
                break
            ray.wait([ref for name, ref in self._refs.items() if name not in failed], timeout=0.2)
            failed = self._failed()
        if len(self._refs) > 1:
            self._group.close()
        dead = {name: error for name, error in failed.items() if isinstance(error, RayActorError)}
        if dead:
            reason = " ".join(str(next(iter(dead.values()))).split())[:300]
            raise PoolError(f"{self.what}: an actor died ({', '.join(dead)}): {reason}")
        name, error = next(iter(failed.items()))
        cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
        text = " ".join(str(cause).split())[:500]
        raise PoolError(f"{self.what}: {name}: {type(cause).__name__}: {text}") from error

    def _failed(self) -> dict[str, RayError]:
        done, _ = ray.wait(list(self._refs.values()), num_returns=len(self._refs), timeout=0)
        failed: dict[str, RayError] = {}
        for name, ref in self._refs.items():
            try:
                if ref in done:
                    ray.get(ref)
            except RayError as error:
                failed[name] = error
        return failed


class LearnerGroup:
    """`cluster.num_learners` Ray actors with the same spec. ranks: their handles by name, rank 0 first."""

    def __init__(
        self,
        spec: LearnerSpec,
        cluster: ClusterConfig,
        learner: type[PolicyLearner] = PolicyLearner,
        placement: Placement | None = None,
    ) -> None:
        actor = make_actor(learner, cluster.cpus_for_learner, cluster.gpus_for_learner)
        self._cluster = cluster
        self.ranks: dict[str, Any] = {
            name: actor.options(**(placement.options(name) if placement else {})).remote(spec, rank)
            for rank, name in enumerate(learner_names(spec.num_learners))
        }
        handles = list(self.ranks.values())
        if len(handles) == 1:
            refs = [handles[0].ready.remote()]
        else:
            # The address goes from rank 0 to the others without the driver waiting for it.
            address = handles[0].listen.remote()
            refs = [handle.join.remote(address) for handle in handles]
        self._ready = LearnerCall(self, "start", dict(zip(self.ranks, refs, strict=True)), cluster.start_timeout_s)

    def ready(self) -> LearnerCall:
        """Ends once all models are loaded."""
        return self._ready

    def update(self, samples: list[TrainSample], step: int) -> LearnerCall:
        """One training step; its metrics."""
        return self._call("update", f"update of step {step}", ray.put(samples), step)

    def snapshot(self, timeout_s: float) -> LearnerCall:
        """Copies the state for the next `save_aside`; done before the next update may begin."""
        return self._call("snapshot", "a copy for the checkpoint", timeout_s=timeout_s)

    def save(self, folder: str, timeout_s: float) -> LearnerCall:
        """Writes policy and optimiser as they are now into `folder`, which the node of rank 0 sees."""
        return self._call("save", "checkpoint", folder, timeout_s=timeout_s)

    def save_aside(self, folder: str, timeout_s: float) -> LearnerCall:
        """Writes the copy of `snapshot`, beside whatever else the learners do."""
        name, handle = next(iter(self.ranks.items()))
        ref = handle.save.options(concurrency_group=SAVE_GROUP).remote(folder)
        return LearnerCall(self, "checkpoint", {name: ref}, timeout_s)

    def load(self, folder: str) -> LearnerCall:
        """Reads what `save` wrote."""
        return self._call("load", "checkpoint", folder)

    def gather(self, version: int) -> LearnerCall:
        """Brings shared-out weights together for the next `weights`."""
        return self._call("gather", f"weights of version {version}")

    def weights(self, version: int) -> LearnerCall:
        """The handle by which workers fetch the policy; right after `gather` has ended."""
        name, handle = next(iter(self.ranks.items()))
        what = f"weights of version {version}"
        return LearnerCall(self, what, {name: handle.weights.remote(version)}, self._cluster.update_timeout_s)

    def silent(self) -> list[str]:
        """Names of learners whose process does not answer: dead or stopped."""
        asked = {
            name: handle.stacks.options(concurrency_group=WATCH_GROUP).remote() for name, handle in self.ranks.items()
        }
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=ALIVE_S)
        out = []
        for name, ref in asked.items():
            try:
                ray.get(ref, timeout=0)
            except (RayError, TimeoutError):
                out.append(name)
        return out

    def close(self) -> None:
        """Ends all learners, whatever they wait for."""
        for handle in self.ranks.values():
            ray.kill(handle)

    def _call(self, method: str, what: str, *arguments: Any, timeout_s: float | None = None) -> LearnerCall:
        refs = {name: getattr(handle, method).remote(*arguments) for name, handle in self.ranks.items()}
        return LearnerCall(self, what, refs, timeout_s or self._cluster.update_timeout_s)

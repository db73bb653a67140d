"""What every caller of Ray actors needs: errors that name who failed, waits with a deadline, and stacks of the stuck.

Invariants: every wait has a deadline; an error names the actor that it is about; the calls of WATCH_GROUP are answered
whatever else an actor does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from slipstream.rollout.engine import EngineError

WATCH_GROUP = "watch"
"""Calls of this concurrency group have a thread of their own: they are answered while everything else is stuck."""
SAVE_GROUP = "save"
"""The same for what may take long and disturbs nobody, such as writing a copy to disk."""


class PoolError(EngineError):
    """A worker died, failed or did not answer in time; the message names it and what was asked."""


class PoolTimeout(PoolError):
    """A deadline passed."""


class ActorLost(Exception):
    """An actor's process or machine is gone, or what it returned; the message is Ray's reason in one line."""


LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)
"""How Ray says that an actor, or the result of its call, is gone."""


FETCH_TIMEOUT_S = 120.0
"""For a result that is there already and has at most to be copied from the store."""


def fetch(ref: Any, name: str, what: str) -> Any:
    """The result of a call that has ended. ActorLost when the actor is gone; PoolError when the call itself failed,
    which it would do again."""
    try:
        return ray.get(ref, timeout=FETCH_TIMEOUT_S)
    except RayTaskError as error:
        # First: where a call failed because another actor died, Ray's error is a RayActorError as well.
        raise _failure(error, name, what) from error
    except LOST as error:
        reason = " ".join(str(error).split())
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise PoolError(f"{what}: {name} cannot start: {reason[-300:]}") from error
        raise ActorLost(reason[:300]) from error
    except RayError as error:
        raise PoolError(f"{what}: {name}: {' '.join(str(error).split())[:300]}") from error


def _failure(error: RayTaskError, name: str, what: str) -> PoolError:
    cause = error.cause if isinstance(error.cause, Exception) else error
    return PoolError(f"{what}: {name}: {type(cause).__name__}: {cause}")


def wait_for(refs: Sequence[Any], names: Sequence[str], what: str, timeout_s: float) -> list[Any]:
    """ray.get with a deadline; PoolError or PoolTimeout names the actors that did not deliver."""
    try:
        return ray.get(list(refs), timeout=timeout_s)
    except GetTimeoutError:
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        late = [name for ref, name in zip(refs, names, strict=True) if ref not in done]
        raise PoolTimeout(f"{what}: waited {timeout_s:g} s for {', '.join(late)}") from None
    except RayTaskError as error:
        raise _failure(error, _failed(refs, names), what) from error
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise PoolError(f"{what}: an actor died ({_failed(refs, names)}): {reason}") from error


def wait_until_ended(refs: Sequence[Any], timeout_s: float) -> list[Any]:
    """Those calls that have ended, well or badly: all of them, or as many as have at the deadline."""
    return ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)[0] if refs else []


def call_off(refs: Sequence[Any], timeout_s: float) -> None:
    """Calls that wait for others do not begin any more, and nobody hears of how they failed."""
    for ref in refs:
        ray.cancel(ref)
    for ref in wait_until_ended(refs, timeout_s):
        with contextlib.suppress(RayError):
            ray.get(ref)


def _failed(refs: Sequence[Any], names: Sequence[str]) -> str:
    """Who has failed by now."""
    done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
    out = []
    for ref, name in zip(refs, names, strict=True):
        if ref in done:
            try:
                ray.get(ref)
            except RayError:
                out.append(name)
    return ", ".join(out or names)


def make_actor(cls: type, num_cpus: float, num_gpus: float, max_concurrency: int = 1) -> Any:
    """A Ray actor class whose instances answer calls of WATCH_GROUP and SAVE_GROUP whatever else they do.

    Ray starts none of them again: a new process would know nothing of what its caller told the old one."""
    # Any: ray's types know neither concurrency groups nor the methods that exist at run time only.
    remote: Any = ray.remote
    groups = {WATCH_GROUP: 1, SAVE_GROUP: 1}
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

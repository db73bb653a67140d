"""Ray: a local one of our own, or a running one by address; and the actors' specs.

Invariants: every way to fail is one line that names the address, the port or the resource, within
cluster.start_timeout_s; a local Ray binds to loopback and is stopped by whoever started it; a job runs on a Ray that
others can reach only where that Ray asks for a token, or where the person said that it need not.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from slipstream.conf.cluster_config import ClusterConfig
from slipstream.conf.schema import Settings
from slipstream.rollout.roster import PoolLimits, worker_name
from slipstream.rollout.worker import WorkerSpec
from slipstream.trainer import node_probe
from slipstream.trainer.errors import ClusterError
from slipstream.trainer.node_probe import auth_mode
from slipstream.trainer.policy import LearnerSpec, learner_names
from slipstream.trainer.weight_sync import WeightSpec

CONNECT_TIMEOUT_S = 5.0
LOOPBACK = "127.0.0.1"
_UNPROTECTED = (
    "whoever reaches this Ray can run code on it; allowed: RAY_AUTH_MODE=token with one token on every node and here "
    "(README, Several machines), or cluster.allow_unauthenticated=true on a network that you trust"
)


@contextmanager
def ray_cluster(cluster: ClusterConfig) -> Iterator[None]:
    """`connect`, and refuses a Ray that anybody can use or that is too small."""
    with connect(cluster):
        import ray

        if cluster.address is not None and not cluster.allow_unauthenticated:
            _check_authenticated(cluster.start_timeout_s)
        if lacking := missing_resources(ray.cluster_resources(), cluster):
            raise ClusterError(lacking[0])
        yield


@contextmanager
def connect(cluster: ClusterConfig) -> Iterator[None]:
    """Connects or starts, and shuts down what was started, whatever happens inside."""
    _check_before_start(cluster)
    # Read when ray is imported: keeps its usage prompt and its metrics agent out of a local job.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if cluster.address is None:
        options |= {
            "num_cpus": max(int(cluster.num_cpus + 0.999), os.cpu_count() or 1),
            "include_dashboard": cluster.dashboard,
            "dashboard_port": cluster.dashboard_port,
            "_node_ip_address": LOOPBACK,
        }
    else:
        options["address"] = cluster.address
    try:
        with loopback_only() if cluster.address is None else nullcontext():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        where = f"cluster.address={cluster.address}" if cluster.address else "local Ray"
        hint = (
            "; is the token of this cluster here (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)?" if cluster.address else ""
        )
        raise ClusterError(f"{where}: {' '.join(str(error).split())[:300]}{hint}") from error
    try:
        if cluster.address is None and (exposed := [node for node in _addresses() if not is_loopback(node)]):
            raise ClusterError(f"local Ray listens on {exposed[0]}; allowed: loopback, which this Ray does not keep to")
        yield
    finally:
        ray.shutdown()


@contextmanager
def loopback_only() -> Iterator[None]:
    """Lets a Ray that is started inside keep to loopback.

    Ray takes an address of loopback as a wish for the machine's own address in the network, unless its clusters are
    switched off, which it reads from the environment when it is imported; its processes inherit that.
    """
    from ray._private import ray_constants

    constants: Any = ray_constants
    name, before = constants.ENABLE_RAY_CLUSTERS_ENV_VAR, constants.ENABLE_RAY_CLUSTER
    variable = os.environ.get(name)
    os.environ[name], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        if variable is None:
            del os.environ[name]
        else:
            os.environ[name] = variable


def _addresses() -> list[str]:
    """Of the alive nodes."""
    import ray

    return [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]


def node_auth_modes(timeout_s: float) -> list[tuple[str, str]]:
    """(address, authentication mode) of every alive node, told by a process there.

    What this process has set says nothing about them. A task, not an actor: in a mix of modes Ray calls the owner of an
    actor back, is turned away and takes the actor for forgotten.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from slipstream.rollout.actors import wait_for

    # By value: a node without this package shall still answer.
    ray.cloudpickle.register_pickle_by_value(node_probe)
    remote: Any = ray.remote(num_cpus=0)(auth_mode)
    addresses, refs = [], []
    for node in ray.nodes():
        if node["Alive"]:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            addresses.append(node["NodeManagerAddress"])
            refs.append(remote.options(scheduling_strategy=pinned).remote())
    modes = wait_for(refs, addresses, "RAY_AUTH_MODE", timeout_s)
    ray.cloudpickle.unregister_pickle_by_value(node_probe)
    return list(zip(addresses, modes, strict=True))


def _check_authenticated(timeout_s: float) -> None:
    """ClusterError when a node that others can reach asks for no token."""
    modes = node_auth_modes(timeout_s)
    without = [f"{address} ({mode})" for address, mode in modes if mode != "token" and not is_loopback(address)]
    if without:
        raise ClusterError(f"token authentication is off on {', '.join(without)}: {_UNPROTECTED}")


def _check_before_start(cluster: ClusterConfig) -> None:
    if cluster.address is None:
        if cluster.dashboard and not _port_free(cluster.dashboard_port):
            raise ClusterError(f"cluster.dashboard_port={cluster.dashboard_port} is in use; allowed: a free port")
        return
    address = cluster.address.removeprefix("ray://")
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"cluster.address={cluster.address}; allowed: null, auto, or host:port of a Ray head")
    if not (cluster.allow_unauthenticated or is_loopback(host) or auth_mode() == "token"):
        raise ClusterError(f"cluster.address={cluster.address} with RAY_AUTH_MODE={auth_mode()}: {_UNPROTECTED}")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"cluster.address={cluster.address}: no Ray answers there ({error}); "
            "start one with `ray start --head`, or drop cluster.address for a local one"
        ) from error


def _port_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address or a host name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def missing_resources(have: dict[str, float], cluster: ClusterConfig) -> list[str]:
    """A line for each resource that the job asks for more of than there is."""
    asked = f"cluster.num_workers={cluster.num_workers}, cluster.num_learners={cluster.num_learners}"
    return [
        f"the job asks for {needed:g} {name}s ({asked}), the Ray cluster has {have.get(name, 0.0):g}"
        for name, needed in (("CPU", cluster.num_cpus), ("GPU", cluster.num_gpus))
        if have.get(name, 0.0) + 1e-9 < needed
    ]


def bundles(cluster: ClusterConfig) -> dict[str, dict[str, float]]:
    """The resources of every actor of the job by name: what cluster.placement reserves."""
    learner = {"CPU": cluster.cpus_for_learner, "GPU": cluster.gpus_for_learner}
    worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    learners = dict.fromkeys(learner_names(cluster.num_learners), learner)
    return learners | {worker_name(i): worker for i in range(cluster.num_workers)}


def pool_limits(cluster: ClusterConfig) -> PoolLimits:
    """What the pool puts up with."""
    return PoolLimits(
        max_worker_restarts=cluster.max_worker_restarts,
        worker_timeout_s=cluster.worker_timeout_s,
        worker_step_timeout_s=cluster.worker_step_timeout_s,
        start_timeout_s=cluster.start_timeout_s,
        max_queued_per_worker=cluster.max_queued_per_worker,
        max_deaths_per_request=cluster.max_deaths_per_request,
        prompt_load_limit=cluster.prompt_load_limit,
    )


def worker_spec(settings: Settings, model_path: str, longest_prompt: int) -> WorkerSpec:
    """The rollout workers' share of the settings. longest_prompt: tokens, sizes the KV cache."""
    engine, drafter, budget = settings.engine, settings.drafter, settings.budget
    return WorkerSpec(
        model_path=model_path,
        dtype=settings.model.dtype,
        random_init_seed=settings.run.seed if settings.model.random_init else None,
        num_gpus=settings.cluster.gpus_per_worker,
        num_threads=settings.cluster.threads_per_worker,
        max_len=longest_prompt + settings.sampling.max_new_tokens,
        max_live_requests=engine.max_live_requests,
        max_forward_tokens=engine.max_forward_tokens,
        kernels=engine.kernels,
        cpu_products=engine.cpu_products,
        cuda_graphs=engine.cuda_graphs,
        compile=engine.compile,
        batch_invariant=engine.batch_invariant,
        drafter=drafter.name,
        window_epochs=drafter.window_epochs,
        min_match=drafter.min_match,
        drafter_args={
            "decay": drafter.decay,
            "escape": drafter.escape,
            "index": drafter.index,
            "max_index_tokens": drafter.max_index_tokens,
            "shared_tokens": drafter.shared_tokens,
            "num_threads": drafter.index_threads,
        },
        max_draft_tokens=drafter.max_draft_tokens,
        budget=budget.name,
        budget_args=budget.model_dump(exclude={"name"}),
        engine_extra_args=engine.extra_args,
    )


def learner_spec(settings: Settings, model_path: str, run_dir: Path) -> LearnerSpec:
    """The learners' share of the settings. run_dir: of this job, whose name its weights on disk bear."""
    weights = settings.weights
    folder = run_dir / "weights" if weights.folder is None else Path(weights.folder) / run_dir.name
    return LearnerSpec(
        model_path=model_path,
        dtype=settings.model.dtype,
        random_init_seed=settings.run.seed if settings.model.random_init else None,
        num_gpus=settings.cluster.gpus_for_learner,
        num_threads=settings.cluster.threads_for_learner,
        temperature=settings.sampling.temperature,
        max_new_tokens=settings.sampling.max_new_tokens,
        algo=settings.algo,
        learner=settings.learner,
        num_learners=settings.cluster.num_learners,
        start_timeout_s=settings.cluster.start_timeout_s,
        call_timeout_s=settings.cluster.update_timeout_s,
        weights=WeightSpec(
            transport=weights.transport,
            delta=weights.delta,
            block_bytes=weights.block_bytes,
            verify=weights.verify,
            folder=str(folder.resolve()),
            num_threads=settings.cluster.threads_for_learner,
            backend="nccl" if min(settings.cluster.gpus_for_learner, settings.cluster.gpus_per_worker) > 0 else "gloo",
            num_receivers=settings.cluster.num_workers,
            one_node=settings.cluster.address is None,
        ),
    )

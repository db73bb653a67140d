"""Ray: a local one of our own, or a running one by address; and the actors' specs.

Invariants: every way to fail is one line that names the address, the port or the resource, within
cluster.start_timeout_s; a local Ray binds to loopback and is stopped by whoever started it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipstream.conf.schema import ClusterConfig, Settings
from slipstream.rollout.worker import WorkerSpec
from slipstream.trainer.errors import ClusterError
from slipstream.trainer.policy import LearnerSpec
from slipstream.trainer.weight_sync import WeightSpec

CONNECT_TIMEOUT_S = 5.0


@contextmanager
def ray_cluster(cluster: ClusterConfig) -> Iterator[None]:
    """Connects or starts, and shuts down what was started, whatever happens inside."""
    _check_before_start(cluster)
    # Read when ray is imported: keeps its usage prompt and its metrics agent out of a local job.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    needed = cluster.num_workers * cluster.cpus_per_worker + cluster.cpus_for_learner
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if cluster.address is None:
        options |= {
            "num_cpus": max(int(needed + 0.999), os.cpu_count() or 1),
            "include_dashboard": cluster.dashboard,
            "dashboard_port": cluster.dashboard_port,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        options["address"] = cluster.address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"cluster.address={cluster.address}" if cluster.address else "local Ray"
        raise ClusterError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    try:
        _check_resources(ray.cluster_resources(), cluster, needed)
        yield
    finally:
        ray.shutdown()


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
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _check_resources(have: dict[str, float], cluster: ClusterConfig, cpus: float) -> None:
    gpus = cluster.num_workers * cluster.gpus_per_worker + cluster.gpus_for_learner
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if have.get(name, 0.0) + 1e-9 < needed:
            raise ClusterError(
                f"the job asks for {needed:g} {name}s (cluster.num_workers={cluster.num_workers} and the learner), "
                f"the Ray cluster has {have.get(name, 0.0):g}"
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
    """The learner's share of the settings. run_dir: of this job, whose name its weights on disk bear."""
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
        weights=WeightSpec(
            transport=weights.transport,
            delta=weights.delta,
            block_bytes=weights.block_bytes,
            verify=weights.verify,
            folder=str(folder.resolve()),
            num_threads=settings.cluster.threads_for_learner,
            backend="nccl" if min(settings.cluster.gpus_for_learner, settings.cluster.gpus_per_worker) > 0 else "gloo",
            num_receivers=settings.cluster.num_workers,
        ),
    )

"""How long do new weights take from the learner to all workers of a node, in copies of the same bytes?

One local Ray, one learner and `--workers` workers as actors, `--mib` MiB of float32. sync_s runs from the learner
having its weights to every worker serving them: publish, all calls, checksums included. copy_s is one copy of the same
bytes in the learner's process, one thread, into memory that was written before: the strictest yardstick, because
fresh_copy_s, a copy into new shared memory, pays for the pages as well. Every transfer has a copy of its own beside it;
medians over `--rounds` after `--warm` rounds, in which the store's memory is touched for the first time; the first of
them is first_sync_s. Delta: AdamW at a learning rate of RL on random gradients; which share of the bytes lies in
changed blocks.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from slipstream.experiments.weight_sync.delta import delta_shares

ARMS = (
    "shared_memory",
    "shared_memory_unverified",
    "shared_memory_private",
    "shared_memory_private_unverified",
    "object_store",
    "object_store_unverified",
)
"""The first is what weights.transport=auto takes on one node, for a learner that is alone there."""
ALL_ARMS = (*ARMS, "shared_memory_copied", "disk", "broadcast", "plain_ray")
DEADLINE_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--mib", type=int, default=1024, help="weights, in MiB of float32 (default 1024)")
    parser.add_argument("--workers", type=int, default=4, help="workers on the node (default 4)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    parser.add_argument("--warm", type=int, default=4, help="rounds before (default 4)")
    parser.add_argument("--threads", type=int, default=2, help="checksum threads of the learner (default 2)")
    parser.add_argument(
        "--all-mib", type=int, default=256, help="weights of the comparison of all transports; 0: none (default 256)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Transfers, then deltas."""
    result = measure(args, args.mib, ARMS)
    if args.all_mib:
        # Smaller: most of these keep two versions in every worker.
        result["all_transports"] = measure(args, args.all_mib, ALL_ARMS)
    options = {"workers": args.workers, "rounds": args.rounds, "warm": args.warm, "threads": args.threads}
    return result | options | {"delta": delta_shares()}


def transport_of(arm: str) -> tuple[str, bool, bool]:
    """weights.transport, weights.verify, and whether the learner's own weights are what is published."""
    transport = arm.removesuffix("_unverified")
    resident = not transport.endswith("_private")
    return transport.removesuffix("_copied").removesuffix("_private"), not arm.endswith("_unverified"), resident


@contextmanager
def local_ray(num_cpus: int, store_bytes: int) -> Iterator[None]:
    """A Ray of our own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from slipstream.trainer.cluster import LOOPBACK, loopback_only

    with loopback_only():
        ray.init(
            num_cpus=num_cpus,
            object_store_memory=store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=LOOPBACK,
        )
    try:
        yield
    finally:
        ray.shutdown()


def gather(refs: Mapping[str, Any], what: str, timeout_s: float) -> dict[str, Any]:
    """The objects by worker."""
    from slipstream.rollout.actors import wait_for

    return dict(zip(refs, wait_for(list(refs.values()), list(refs), what, timeout_s), strict=True))


def commit(actor: Any, version: int, receipts: Sequence[Any]) -> Any:
    """As a pool's."""
    return actor.commit_policy.remote(version, *receipts)


class Bench:
    """The actors, and one transfer by any arm. Arms take turns as a whole: each has its own memory to warm."""

    def __init__(self, args: argparse.Namespace, mib: int, folder: str) -> None:
        import ray

        from slipstream.experiments.weight_sync.actors import BenchLearner, BenchWorker

        remote: Any = ray.remote(num_cpus=1)  # ray's types know no methods that exist at run time only
        self._folder, self._version = folder, 0
        self.learner = remote(BenchLearner).remote(mib, args.threads, args.workers)
        self._workers = [remote(BenchWorker).remote(mib) for _ in range(args.workers)]
        self.num_bytes = ray.get(self.learner.num_bytes.remote(), timeout=DEADLINE_S)
        # Known to a pool from the start of each worker.
        self._nodes = ray.get([worker.node_id.remote() for worker in self._workers], timeout=DEADLINE_S)

    def begin(self, arm: str) -> None:
        """Another arm's turn."""
        import ray

        adopts = [worker.set_adopts.remote(not arm.endswith("_copied")) for worker in self._workers]
        ray.get(adopts, timeout=DEADLINE_S)

    def sync(self, arm: str) -> tuple[float, float]:
        """Seconds of one transfer, and those until the version before it could be changed; that it arrived is checked
        afterwards."""
        import ray

        from slipstream.rollout.actors import wait_for
        from slipstream.rollout.weight_handle import ComingHandle
        from slipstream.rollout.weight_update import check_served, prepare_workers

        settle_s = ray.get(self.learner.change.remote(), timeout=DEADLINE_S)
        self._version += 1
        workers, version = self._workers, self._version
        names = [f"worker {i}" for i in range(len(workers))]
        started = time.perf_counter()
        if arm == "plain_ray":
            [weights] = ray.get(self.learner.put_plainly.remote(), timeout=DEADLINE_S)
            wait_for([w.copy_plainly.remote(weights, version) for w in workers], names, arm, DEADLINE_S)
        else:
            published = self.learner.publish.remote(*transport_of(arm), self._folder, version)
            coming = ComingHandle(published, lambda: ray.get(published, timeout=DEADLINE_S))
            actors = dict(zip(names, workers, strict=True))
            update, refs = prepare_workers(actors, self._nodes, coming, commit, DEADLINE_S, gather)
            check_served(gather(refs, arm, DEADLINE_S), update.handle)
        seconds = time.perf_counter() - started
        for found in wait_for([worker.first_elements.remote() for worker in workers], names, arm, DEADLINE_S):
            assert found == [float(i + version) for i in range(len(found))], f"{arm}: a worker holds other weights"
        return seconds, settle_s

    def end(self) -> None:
        """The arm's turn is over."""
        import ray

        ray.get(self.learner.forget.remote(), timeout=DEADLINE_S)

    def learner_s(self, what: str) -> float:
        """A figure that the learner measures."""
        import ray

        return float(ray.get(getattr(self.learner, what).remote(), timeout=DEADLINE_S))


def measure(args: argparse.Namespace, mib: int, arms: Sequence[str]) -> dict[str, Any]:
    """All arms on one Ray."""
    with local_ray(args.workers + 2, (mib << 20) * 4 + (256 << 20)), tempfile.TemporaryDirectory() as folder:
        return measure_arms(Bench(args, mib, folder), arms, args.warm, args.rounds)


def measure_arms(bench: Bench, arms: Sequence[str], warm: int, rounds: int) -> dict[str, Any]:
    """Every arm beside a copy, round by round."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    copies: dict[str, list[float]] = {arm: [] for arm in arms}
    settled: dict[str, list[float]] = {arm: [] for arm in arms}
    first: dict[str, float] = {}
    fresh: list[float] = []
    for arm in arms:
        bench.begin(arm)
        for i in range(warm + rounds):
            copy_s = bench.learner_s("copy_s")
            sync_s, settle_s = bench.sync(arm)
            first.setdefault(arm, sync_s)
            if i >= warm:
                seconds[arm].append(sync_s)
                copies[arm].append(copy_s)
                settled[arm].append(settle_s)
        bench.end()
    for _ in range(3):
        fresh.append(bench.learner_s("fresh_copy_s"))
    copy_s, fresh_s = float(np.median(np.concatenate(list(copies.values())))), float(np.median(fresh))
    result: dict[str, Any] = {"bytes": bench.num_bytes, "copy_s": copy_s, "fresh_copy_s": fresh_s}
    for arm in arms:
        sync_s = float(np.median(seconds[arm]))
        ratios = [a / b for a, b in zip(seconds[arm], copies[arm], strict=True)]
        result[arm] = {
            "sync_s": sync_s,
            "sync_s_all": seconds[arm],
            "sync_over_copy": float(np.median(ratios)),
            "sync_over_fresh_copy": sync_s / fresh_s,
            "settle_s": float(np.median(settled[arm])),
            "first_sync_s": first[arm],
            "first_sync_over_fresh_copy": first[arm] / fresh_s,
        }
    default = result[arms[0]]
    return {"sync_s": default["sync_s"], "sync_over_copy": default["sync_over_copy"]} | result

"""`slipstream cluster check`: asks every node of the Ray cluster whether a job can run there.

Invariants: every node is asked by a process of its own that runs nowhere else, with a deadline; what differs from the
majority, or falls short of what the job needs, is one line with node, key, value and what is allowed; nothing that is
found is changed, and nothing stays behind.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream.conf.schema import Settings
from slipstream.trainer import node_probe
from slipstream.trainer.cluster import connect, is_loopback, missing_resources, node_auth_modes
from slipstream.trainer.config import load_settings, model_folder
from slipstream.trainer.errors import ClusterError, ConfigError
from slipstream.trainer.model_shape import read_model_shape
from slipstream.trainer.node_probe import NodeProbe, auth_mode, folder_digest

ANSWER_TIMEOUT_S = 60.0
REACH_TIMEOUT_S = 5.0
ALLOWED_CLOCK_S = 2.0
MOST_DISK_USED_SHARE = 0.95
"""Above it Ray refuses to write objects to disk (RAY_local_fs_capacity_threshold)."""
LEAST_FREE_BYTES = 1 << 30
"""For logs and metrics, on any disk."""
BYTES_PER_INDEXED_TOKEN = 52
"""Of the drafter's index in shared memory, rounded up from `slipstream bench drafter_index`."""
SAME_EVERYWHERE = ("python", "ray", "torch", "transformers", "slipstream", "sources", "native", "auth_mode", "token")
THIS = "this shell"


@dataclass(slots=True)
class Node:
    """One alive node. facts: see NodeProbe.facts; resources: as Ray knows them; unreachable: by name of the other node
    why a connection to it failed; silent: why the node did not answer at all."""

    name: str
    address: str
    resources: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    clock_s: float = 0.0
    round_trip_s: float = 0.0
    sees_run_dir: bool = True
    unreachable: dict[str, str] = field(default_factory=dict)
    silent: str = ""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a job asks of a node. weights_bytes: 0 where the model's size is unknown; model: digest of its folder, None
    where every node fetches it for itself; unauthenticated: whether that was allowed."""

    weights_bytes: int
    checkpoint_bytes: int
    index_bytes: int
    model: str | None
    unauthenticated: bool


def main(arguments: Sequence[str]) -> int:
    """`slipstream cluster check [OVERRIDES]`: 0 when every node can run the job, else 1."""
    from slipstream.trainer.main import OneLineParser

    parser = OneLineParser("slipstream cluster", description="Asks every node of the Ray cluster about itself.")
    parser.add_argument("action", choices=["check"])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="KEY=VALUE or GROUP=CHOICE, as in train")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    settings = load_settings(args.overrides, args.config_dir)
    nodes, problems = check_cluster(settings)
    print(format_table(nodes))
    for problem in problems:
        print(problem)
    count = sum(1 for node in nodes if node.address)
    print(f"{count} nodes, {len(problems)} problems" if problems else f"{count} nodes: all of them can run the job")
    return 1 if problems else 0


def check_cluster(settings: Settings) -> tuple[list[Node], list[str]]:
    """Connects (or starts a local Ray), asks, and compares; ClusterError when there is no Ray to connect to, or
    when only some ask for a token.

    The nodes, this process before them as one without an address; and the problems, one line each.
    """
    import ray

    with connect(settings.cluster):
        here, others = auth_mode(), node_auth_modes(ANSWER_TIMEOUT_S)
        if mixed := [f"{address} ({mode})" for address, mode in others if mode != here]:
            raise ClusterError(
                f"RAY_AUTH_MODE={here} here, but not on {', '.join(mixed)}: in a mix nothing works reliably; allowed: "
                "RAY_AUTH_MODE=token everywhere"
            )
        nodes = _ask_nodes(settings)
        lacking = missing_resources(ray.cluster_resources(), settings.cluster)
    return nodes, find_problems(nodes, needs_of(settings)) + lacking


def needs_of(settings: Settings) -> Needs:
    """From the settings and the headers of the model's files; nothing is loaded."""
    folder = model_folder(settings.model.path)
    shape = read_model_shape(folder) if folder is not None else None
    algo, sampling, drafter, checkpoint = settings.algo, settings.sampling, settings.drafter, settings.checkpoint
    state_bytes = (shape.num_parameters if shape else 0) * (4 if settings.model.dtype == "float32" else 2)
    num_kept = checkpoint.keep_last + checkpoint.keep_best + 1
    samples = algo.num_steps * algo.num_prompts_per_step * sampling.num_samples_per_prompt
    indexed = min(drafter.max_index_tokens, samples * sampling.max_new_tokens)
    shares = drafter.name == "suffix" and drafter.share_index
    builtin = settings.model.path.startswith("builtin:")
    return Needs(
        weights_bytes=state_bytes,
        checkpoint_bytes=3 * state_bytes * num_kept,  # AdamW's two moments have the type of the weights
        index_bytes=BYTES_PER_INDEXED_TOKEN * indexed if shares else 0,
        model=None if folder is None or builtin else folder_digest(folder),
        unauthenticated=settings.cluster.allow_unauthenticated,
    )


# ---- asking


def _ask_nodes(settings: Settings) -> list[Node]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # By value: the nodes need not have this package, or the same version of it.
    ray.cloudpickle.register_pickle_by_value(node_probe)
    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = Counter(node["NodeManagerAddress"] for node in alive)
    nodes, probes = [], []
    remote: Any = ray.remote  # its types know no options of actors
    actor = remote(num_cpus=0, max_concurrency=4)(NodeProbe)
    for entry in alive:
        address, node_id = entry["NodeManagerAddress"], entry["NodeID"]
        nodes.append(
            Node(address if addresses[address] == 1 else f"{address}#{node_id[:6]}", address, entry["Resources"])
        )
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        probes.append(actor.options(scheduling_strategy=pinned).remote())
    try:
        here = _ask_facts(nodes, probes, settings)
        answering = [(node, probe) for node, probe in zip(nodes, probes, strict=True) if not node.silent]
        _ask_sight(answering, Path(settings.run.dir).absolute())
        _ask_clocks(answering)
        _ask_connections(answering)
    finally:
        for probe in probes:
            ray.kill(probe)
        ray.cloudpickle.unregister_pickle_by_value(node_probe)
    return [here, *nodes]


def _ask_facts(nodes: list[Node], probes: list[Any], settings: Settings) -> Node:
    """Fills in what needs no other node; this process with the same facts."""
    model, salt = model_folder(settings.model.path), secrets.token_hex(8)
    question = salt, str(Path(settings.run.dir).absolute()), str(model.resolve()) if model is not None else None
    for node, answer in zip(nodes, _answers([probe.facts.remote(*question) for probe in probes]), strict=True):
        if isinstance(answer, str):
            node.silent = answer
        else:
            node.facts = answer
    return Node(THIS, "", {}, NodeProbe().facts(*question))


def _ask_sight(answering: list[tuple[Node, Any]], run_dir: Path) -> None:
    """Whether the nodes see a file that this process makes under run.dir and removes again."""
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    mark = run_dir / f".cluster-check-{secrets.token_hex(8)}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        mark.touch()
        refs = [probe.exists.remote(str(mark)) for _, probe in answering]
        for (node, _), answer in zip(answering, _answers(refs), strict=True):
            node.sees_run_dir = answer is True
    except OSError as error:
        raise ConfigError(f"run.dir={run_dir}: {error.strerror}; allowed: a folder that can be written to") from None
    finally:
        mark.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _ask_clocks(answering: list[tuple[Node, Any]]) -> None:
    """The offset of a node's clock is what it says minus the middle of the question's round trip; best of three."""
    for node, probe in answering:
        node.round_trip_s = math.inf
        for _ in range(3):
            asked = time.time()
            (answer,) = _answers([probe.now_s.remote()])
            round_trip = time.time() - asked
            if not isinstance(answer, str) and round_trip < node.round_trip_s:
                node.clock_s, node.round_trip_s = answer - (asked + round_trip / 2), round_trip


def _ask_connections(answering: list[tuple[Node, Any]]) -> None:
    """Every node, and this process, connects to a port of every other node: both directions of every pair."""
    secret = secrets.token_hex(8)
    ports = _answers([probe.listen.remote(node.address, secret) for node, probe in answering])
    targets = {}
    for (node, _), port in zip(answering, ports, strict=True):
        if isinstance(port, int):
            targets[node.name] = (node.address, port)
        else:
            node.unreachable[node.name] = port
    others = [{name: target for name, target in targets.items() if name != node.name} for node, _ in answering]
    refs = [
        probe.reach.remote(other, secret, REACH_TIMEOUT_S) for (_, probe), other in zip(answering, others, strict=True)
    ]
    from_here = NodeProbe().reach(targets, secret, REACH_TIMEOUT_S)
    for (node, _), answer in zip(answering, _answers(refs), strict=True):
        node.unreachable |= {node.name: answer} if isinstance(answer, str) else answer
        if node.name in from_here:
            node.unreachable[THIS] = from_here[node.name]


def _answers(refs: list[Any]) -> list[Any]:
    """What each reference gives, or as a text why it gives nothing; all of them within one deadline."""
    import ray
    from ray.exceptions import RayError

    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=ANSWER_TIMEOUT_S) if refs else ([], [])
    out: list[Any] = []
    for ref in refs:
        try:
            out.append(ray.get(ref) if ref in ready else f"no answer within {ANSWER_TIMEOUT_S:g} s")
        except RayError as error:
            out.append(" ".join(str(error).split())[:300])
    return out


# ---- judging


def find_problems(nodes: Sequence[Node], needs: Needs) -> list[str]:
    """One line for everything that differs from the majority or falls short; [] when every node will do.

    nodes: as check_cluster returns them; a node without an address is the asking process.
    """
    out = [
        f"{node.name}: no answer: {node.silent}; allowed: one within {ANSWER_TIMEOUT_S:g} s"
        for node in nodes
        if node.silent
    ]
    answering = [node for node in nodes if not node.silent]
    there = [node for node in answering if node.address]
    for key in SAME_EVERYWHERE:
        out += _differing(key, [(node.name, str(node.facts[key])) for node in answering])
    out += _differing("gpus", [(node.name, _gpu_text(node)) for node in there if node.facts["gpus"]])
    for node in there:
        for key, value, allowed in _shortcomings(node, needs):
            out.append(f"{node.name}: {key}={value}; allowed: {allowed}")
        for other, error in sorted(node.unreachable.items()):
            pair = f"{THIS} to {node.name}" if other == THIS else f"{node.name} to {other}"
            out.append(f"ports: {pair}: {error}; allowed: all TCP ports open between the nodes")
    return out


def _differing(key: str, values: list[tuple[str, str]]) -> list[str]:
    """A line for each that is not as most are; of equally many as this process, which comes first, or the first."""
    counts = Counter(value for _, value in values)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    of = f"as on {counts[usual]} of {len(values)}"
    shown = "the same one" if key == "token" else usual
    return [
        f"{name}: {key}={'another one' if key == 'token' and value != 'none' else value}; allowed: {shown}, {of}"
        for name, value in values
        if value != usual
    ]


def _shortcomings(node: Node, needs: Needs) -> list[tuple[str, str, str]]:
    """(key, value, allowed) of one node by itself."""
    facts, out = node.facts, []
    if facts["auth_mode"] != "token" and not (needs.unauthenticated or is_loopback(node.address)):
        out.append(("RAY_AUTH_MODE", facts["auth_mode"], "token, or cluster.allow_unauthenticated=true"))
    claimed = node.resources.get("GPU", 0.0)
    if claimed > len(facts["gpus"]):
        out.append(("GPUs", f"{len(facts['gpus'])}", f"{claimed:g}, as Ray was told"))
    if abs(node.clock_s) > ALLOWED_CLOCK_S + node.round_trip_s:
        out.append(("clock", f"{node.clock_s:+.1f} s", f"within {ALLOWED_CLOCK_S:g} s of {THIS} and the round trip"))
    if not node.sees_run_dir:
        out.append(("run.dir", "not seen", "a folder that all nodes share: the learner writes checkpoints there"))
    if needs.model is not None and facts["model"] != needs.model:
        value = "missing" if facts["model"] == "missing" else "other files"
        out.append(("model.path", value, "the same folder at the same path as here, or a hub id"))
    store, least = node.resources.get("object_store_memory", 0.0), 2 * needs.weights_bytes
    if store < least:
        out.append(("object_store_memory", _size(store), f"at least {_size(least)}, the policy's weights twice"))
    if facts["shm_bytes"] < store + needs.index_bytes:
        parts = f"object store {_size(store)}, drafter's index {_size(needs.index_bytes)}"
        out.append(("/dev/shm", _size(facts["shm_bytes"]), f"at least {_size(store + needs.index_bytes)} ({parts})"))
    least = LEAST_FREE_BYTES + needs.checkpoint_bytes
    if facts["run_free_bytes"] < least:
        out.append(("disk of run.dir", f"{_size(facts['run_free_bytes'])} free", f"at least {_size(least)}"))
    if facts["ray_free_bytes"] < LEAST_FREE_BYTES or facts["ray_used_share"] > MOST_DISK_USED_SHARE:
        value = f"{_size(facts['ray_free_bytes'])} free, {facts['ray_used_share']:.0%} used"
        out.append(
            ("disk of Ray's files", value, f"at least {_size(LEAST_FREE_BYTES)}, at most {MOST_DISK_USED_SHARE:.0%}")
        )
    return out


# ---- showing


def format_table(nodes: Sequence[Node]) -> str:
    """One row for each node, columns as wide as they need to be."""
    head = ["node", "python", "ray", "torch", "slipstream", "native", "GPUs", "clock", "shm", "run disk", "ray disk"]
    rows = [[*head, "auth", "connections"]] + [_row(node) for node in nodes]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(node: Node) -> list[str]:
    if node.silent:
        return [node.name, "no answer", *[""] * 11]
    facts = node.facts
    cells = [node.name, facts["python"], facts["ray"], facts["torch"]]
    cells += [f"{facts['slipstream']} ({facts['sources']})", facts["native"]]
    if not node.address:
        return [*cells, *[""] * 5, facts["auth_mode"], ""]
    cells += [_gpu_text(node) or "none", f"{node.clock_s:+.3f} s", _size(facts["shm_bytes"])]
    cells += [_size(facts["run_free_bytes"]), _size(facts["ray_free_bytes"]), facts["auth_mode"]]
    return [*cells, f"{len(node.unreachable)} fail" if node.unreachable else "ok"]


def _gpu_text(node: Node) -> str:
    return ", ".join(f"{count} x {gpu}" for gpu, count in Counter(node.facts["gpus"]).items())


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"

"""What `slipstream cluster check` makes of the nodes' answers; the answers: integration/test_two_nodes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream.conf.schema import ClusterConfig
from slipstream.trainer.cluster import is_loopback, missing_resources
from slipstream.trainer.cluster_check import THIS, Needs, Node, find_problems, format_table, needs_of
from slipstream.trainer.config import load_settings
from slipstream.trainer.node_probe import NodeProbe, folder_digest, token_hash

NEEDS = Needs(weights_bytes=10**9, checkpoint_bytes=10**10, index_bytes=10**9, model="abc", unauthenticated=False)
FACTS = {
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.13.0",
    "transformers": "5.10.4",
    "slipstream": "0.1.0",
    "sources": "0123abcd",
    "native": "built",
    "gpus": ["H100, 81559 MiB, 570.1"] * 8,
    "shm_bytes": 10**11,
    "shm_free_bytes": 10**11,
    "run_free_bytes": 10**12,
    "model": "abc",
    "auth_mode": "token",
    "token": "feed",
    "ray_free_bytes": 10**11,
    "ray_used_share": 0.3,
}


def node(number: int, **changed: Any) -> Node:
    """A node that will do, but for what is changed: facts, or fields of Node."""
    facts = FACTS | {name: value for name, value in changed.items() if name in FACTS}
    resources = {"GPU": 8.0, "CPU": 64.0, "object_store_memory": 5e9}
    out = Node(f"10.0.0.{number}", f"10.0.0.{number}", resources, facts, 0.001, 0.002)
    for name in changed.keys() - FACTS.keys():
        setattr(out, name, changed[name])
    return out


def cluster(**changed: Any) -> list[Node]:
    """This shell and four nodes, of which the third is changed."""
    return [Node(THIS, "", {}, dict(FACTS)), node(1), node(2), node(3, **changed), node(4)]


def test_nodes_that_will_do() -> None:
    assert find_problems(cluster(), NEEDS) == []
    table = format_table(cluster()).splitlines()
    assert len(table) == 6
    assert table[3].startswith("10.0.0.2")
    assert table[3].endswith("ok")
    assert "8 x H100, 81559 MiB, 570.1" in table[3]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"torch": "2.11.0"}, "10.0.0.3: torch=2.11.0; allowed: 2.13.0, as on 4 of 5"),
        ({"sources": "ffff0000"}, "10.0.0.3: sources=ffff0000; allowed: 0123abcd, as on 4 of 5"),
        ({"slipstream": "missing"}, "10.0.0.3: slipstream=missing; allowed: 0.1.0, as on 4 of 5"),
        ({"native": "missing"}, "10.0.0.3: native=missing; allowed: built, as on 4 of 5"),
        ({"token": "beef"}, "10.0.0.3: token=another one; allowed: the same one, as on 4 of 5"),
        ({"token": "none"}, "10.0.0.3: token=none; allowed: the same one, as on 4 of 5"),
        ({"resources": {"GPU": 9.0, "object_store_memory": 5e9}}, "10.0.0.3: GPUs=8; allowed: 9, as Ray was told"),
        ({"gpus": ["A100, 81559 MiB, 570.1"] * 8}, "10.0.0.3: gpus=8 x A100, 81559 MiB, 570.1; allowed: 8 x H100"),
        ({"clock_s": -5.0}, "10.0.0.3: clock=-5.0 s; allowed: within 2 s"),
        ({"sees_run_dir": False}, "10.0.0.3: run.dir=not seen; allowed: a folder that all nodes share"),
        ({"model": "missing"}, "10.0.0.3: model.path=missing; allowed: the same folder"),
        ({"model": "cba"}, "10.0.0.3: model.path=other files; allowed: the same folder"),
        ({"shm_bytes": 64 * 10**6}, "10.0.0.3: /dev/shm=0.1 GB; allowed: at least 6.0 GB (object store 5.0 GB, d"),
        ({"run_free_bytes": 10**10}, "10.0.0.3: disk of run.dir=10.0 GB free; allowed: at least 11.1 GB"),
        ({"ray_used_share": 0.97}, "10.0.0.3: disk of Ray's files=100.0 GB free, 97% used; allowed: at least 1.1 GB"),
        ({"resources": {"object_store_memory": 1e9}}, "10.0.0.3: object_store_memory=1.0 GB; allowed: at least 2.0 GB"),
        ({"unreachable": {"10.0.0.1": "port 7: timed out"}}, "ports: 10.0.0.3 to 10.0.0.1: port 7: timed out; allowed"),
        ({"unreachable": {THIS: "port 7: timed out"}}, f"ports: {THIS} to 10.0.0.3: port 7: timed out; allowed: all"),
        ({"silent": "no answer within 60 s"}, "10.0.0.3: no answer: no answer within 60 s; allowed: one within 60 s"),
    ],
    ids=str,
)  # fmt: skip
def test_the_odd_one_out_is_named_in_one_line(changed: dict[str, Any], line: str) -> None:
    (problem,) = find_problems(cluster(**changed), NEEDS)
    assert problem.startswith(line)
    assert "\n" not in problem


def test_a_clock_is_as_far_off_as_the_round_trip_leaves_in_doubt() -> None:
    assert find_problems(cluster(clock_s=2.5, round_trip_s=0.6), NEEDS) == []
    assert find_problems(cluster(clock_s=2.5, round_trip_s=0.4), NEEDS) != []


def test_authentication_is_due_where_others_can_reach_the_node() -> None:
    nodes = [Node(THIS, "", {}, FACTS | {"auth_mode": "disabled"}), node(1, auth_mode="disabled")]
    (problem,) = find_problems(nodes, NEEDS)
    assert problem.startswith("10.0.0.1: RAY_AUTH_MODE=disabled; allowed: token, or cluster.allow_unauthenticated=true")
    assert find_problems(nodes, Needs(0, 0, 0, None, True)) == []
    nodes[1].address = "127.0.0.1"
    assert find_problems(nodes, Needs(0, 0, 0, None, False)) == []


def test_needs_follow_the_job() -> None:
    small = needs_of(load_settings(["experiment=quickstart_short", "algo.num_steps=2", "checkpoint.keep_best=1"]))
    parameters = small.weights_bytes // 4
    assert 10**5 < parameters < 10**7
    assert small.checkpoint_bytes == 4 * 12 * parameters, "2 newest, 1 best and the one being written"
    large = needs_of(load_settings(["experiment=quickstart_short", "algo.num_steps=4", "model.dtype=bfloat16"]))
    assert large.index_bytes == 2 * small.index_bytes
    assert large.weights_bytes == small.weights_bytes // 2
    assert needs_of(load_settings(["experiment=quickstart_short", "drafter=ngram"])).index_bytes == 0


def test_what_a_cluster_lacks_is_one_line_for_each_resource() -> None:
    config = ClusterConfig(num_workers=3, cpus_per_worker=2.0, gpus_for_learner=1.0)
    assert missing_resources({"CPU": 7.0, "GPU": 1.0}, config) == []
    cpus, gpus = missing_resources({"CPU": 6.0}, config)
    assert "asks for 7 CPUs" in cpus
    assert "has 6" in cpus
    assert "asks for 1 GPUs" in gpus
    assert "has 0" in gpus


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("localhost", True), ("[::1]", True), ("10.0.0.1", False), ("h", False)],
)
def test_loopback_is_what_nobody_else_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_ports_are_probed_with_real_connections() -> None:
    first, second = NodeProbe(), NodeProbe()
    port = first.listen("127.0.0.1", "secret")
    other = first.listen("127.0.0.1", "another secret")
    closed = second.listen("127.0.0.1", "")
    targets = {"good": ("127.0.0.1", port), "stranger": ("127.0.0.1", other), "mute": ("127.0.0.1", closed)}
    targets["nobody"] = ("127.0.0.1", 1)
    found = second.reach(targets, "secret", 5.0)
    assert set(found) == {"stranger", "mute", "nobody"}
    assert "refused" in found["nobody"]


def test_a_token_is_compared_by_a_salted_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._raylet import AuthenticationTokenLoader

    monkeypatch.setenv("RAY_AUTH_TOKEN", "correct horse battery staple")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        first, other = token_hash("salt"), token_hash("pepper")
    finally:
        monkeypatch.undo()
        AuthenticationTokenLoader.instance().reset_cache()
    assert len(first) == 16
    assert first != other
    assert "horse" not in first


def test_a_models_folder_is_known_by_its_files(tmp_path: Path) -> None:
    assert folder_digest(tmp_path / "none") == "missing"
    (tmp_path / "config.json").write_text("{}")
    before = folder_digest(tmp_path)
    assert folder_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert folder_digest(tmp_path) != before

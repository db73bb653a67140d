"""Two Ray nodes on one machine, with token authentication on.

Where the machine allows (root, and a kernel with network namespaces) each node has a network and an address of its own,
joined by a virtual cable; elsewhere both share the machine's. Drivers belong on the head: Ray looks for their node
among the processes that it sees, and the nodes still share those.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.processes import descendants

START_TIMEOUT_S = 120.0
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class TwoRaylets:
    """addresses: of head and second node; prefix: before a command that is to run on the head; roots: process ids of
    the two `ray start --block`."""

    port: int
    addresses: tuple[str, str]
    prefix: list[str]
    roots: tuple[int, int]
    environment: dict[str, str]

    @property
    def address(self) -> str:
        """What a job joins."""
        return f"{self.addresses[0]}:{self.port}"

    def run(
        self, command: Sequence[str], folder: Path, timeout_s: float = 500.0, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the head; environment: changes, None takes a name away."""
        merged = {name: value for name, value in (self.environment | environment).items() if value is not None}
        full = [*self.prefix, *command]
        return subprocess.run(
            full, cwd=folder, env=merged, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def processes(self, node: int) -> list[str]:
        """Titles of all processes of a node."""
        return list(descendants(self.roots[node]).values())


@contextlib.contextmanager
def two_raylets(num_cpus: tuple[float, float], authenticated: bool = True) -> Iterator[TwoRaylets]:
    """Starts a head and a second node, and stops both with everything that they started."""
    folder = Path(tempfile.mkdtemp(prefix="slip"))  # short: Ray's sockets lie below it
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    mode = {"RAY_AUTH_MODE": "token" if authenticated else "disabled", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment = dict(os.environ) | mode | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    with _networks() as (prefixes, addresses):
        port = 6379 if prefixes[0] else _free_port()
        head = ["--head", f"--port={port}", "--include-dashboard=false"]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for node, role in enumerate((head, [f"--address={addresses[0]}:{port}"])):
                command = [
                    *prefixes[node], *RAY, "start", "--block", *role,
                    f"--node-ip-address={addresses[node]}", f"--num-cpus={num_cpus[node]:g}",
                    f"--temp-dir={folder / str(node)}", "--object-store-memory=200000000",
                ]  # fmt: skip
                with open(folder / f"{node}.log", "wb") as log:
                    one = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                started.append(one)
                _await(folder / f"{node}.log", one)
            roots = started[0].pid, started[1].pid
            yield TwoRaylets(port, addresses, prefixes[0], roots, environment)
        finally:
            for one in reversed(started):
                _stop(one)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _networks() -> Iterator[tuple[tuple[list[str], list[str]], tuple[str, str]]]:
    """(prefix of commands of each node, address of each node)."""
    names = [f"slip{os.getpid()}{letter}" for letter in "ab"]
    if not _ip("netns", "add", names[0]):
        from ray.util import get_node_ip_address

        yield ([], []), (get_node_ip_address(), get_node_ip_address())
        return
    try:
        addresses = "10.231.7.1", "10.231.7.2"  # in networks that nobody else is in
        done = _ip("netns", "add", names[1])
        cable = [
            "link",
            "add",
            "cable0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable1",
            "netns",
            names[1],
        ]
        done = done and _ip(*cable)
        for i, name in enumerate(names):
            done = done and _ip("-n", name, "addr", "add", f"{addresses[i]}/30", "dev", f"cable{i}")
            done = done and _ip("-n", name, "link", "set", "lo", "up")
            done = done and _ip("-n", name, "link", "set", f"cable{i}", "up")
        assert done, "network namespaces can be made, but not joined"
        prefixes = ["ip", "netns", "exec", names[0]], ["ip", "netns", "exec", names[1]]
        yield prefixes, addresses
    finally:
        for name in names:
            _ip("netns", "del", name)


def _ip(*arguments: str) -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    return subprocess.run(["ip", *arguments], capture_output=True, timeout=30, check=False).returncode == 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _await(log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The node's processes: known by their ancestor, whatever sessions they have made."""
    family = descendants(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for pid in [*family, process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(20)

"""A Ray of two nodes on this machine, on loopback alone and with token authentication.

Invariants: both raylets, and all their processes, are descendants of processes started here; `close` ends them all.
The token lies in a file that only its owner can read, and never on a command line.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

from slipstream.experiments.chaos.processes import descendants, kill_tree, titled
from slipstream.trainer.errors import ClusterError

LOOPBACK = "127.0.0.1"
# `ray start` replaces a loopback address by that of the network card, and would listen to the network.
LAUNCH = (
    "import ray._private.services as services; "
    f"services.get_node_ip_address = lambda address=None: '{LOOPBACK}'; "
    "from ray.scripts.scripts import main; main()"
)
STORE_BYTES = 100_000_000
START_TIMEOUT_S = 60.0
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "5",
}
"""A lost node is noticed within seconds, and one on a machine that is busy is not taken for lost."""


class TwoNodes:
    """A head and a second node with `cpus_per_node` each."""

    def __init__(self, folder: Path, cpus_per_node: int) -> None:
        """folder: for logs and the token; its path must be short, because sockets lie below it."""
        self._folder, self._cpus = folder, cpus_per_node
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            self._port = probe.getsockname()[1]
        self.address = f"{LOOPBACK}:{self._port}"
        token = folder / "ray_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # In a driver: its own address is the loopback one, too.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._num_started = 0

    def start(self) -> None:
        """Starts both nodes and waits for them."""
        self._launch("head", ["--head", f"--port={self._port}", "--include-dashboard=false"])
        self.start_second()

    def start_second(self) -> None:
        """Starts the second node, after it was killed or for the first time."""
        self._launch("second", [f"--address={self.address}"])

    def kill_second(self) -> None:
        """SIGKILL to the second raylet and to everything that runs on it."""
        node = self._nodes.pop("second")
        kill_tree(node.pid)
        node.wait()

    @property
    def roots(self) -> list[int]:
        """The processes that all others of this Ray descend from."""
        return [node.pid for node in self._nodes.values()]

    def actors(self, word: str) -> list[int]:
        """The actors whose class name ends with `word`."""
        return titled(self.roots, word)

    def close(self) -> None:
        """Ends both nodes."""
        for node in reversed(self._nodes.values()):
            pids = descendants([node.pid])
            node.terminate()
            try:
                node.wait(10.0)
            except subprocess.TimeoutExpired:
                pids = descendants([node.pid])
            for pid in pids[::-1]:
                kill_tree(pid)
            node.wait()
        self._nodes.clear()

    def _launch(self, name: str, arguments: list[str]) -> None:
        self._num_started += 1
        log = self._folder / f"node-{self._num_started}-{name}.log"
        common = [
            f"--node-ip-address={LOOPBACK}",
            f"--num-cpus={self._cpus}",
            "--num-gpus=0",
            f"--object-store-memory={STORE_BYTES}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--disable-usage-stats",
            "--block",
        ]
        if name == "head":
            common.append(f"--temp-dir={self._folder / 'ray'}")
        command = [sys.executable, "-c", LAUNCH, "start", *arguments, *common]
        environment = {key: value for key, value in self.environment.items() if "OSX_CLUSTER" not in key} | HEALTH
        with log.open("wb") as output:
            self._nodes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )
        self._wait(self._nodes[name], log)

    def _wait(self, node: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if node.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
                raise ClusterError(f"bench chaos: a Ray node does not start: {lines[-1][:300]}")
            time.sleep(0.05)

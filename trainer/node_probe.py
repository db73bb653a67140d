"""What one machine is like, told by a process on it.

Invariants: imported from nothing but the standard library, because it travels to nodes that may lack this package or
have another version of it; every question has an answer, if only why there is none; a token never leaves its machine,
only a hash of it with the asker's salt.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MEMORY = Path("/dev/shm")
ROOMS = ("conf", "drafter", "kernels", "rollout", "trainer")


class NodeProbe:
    """Answers questions about the machine that it runs on; on other nodes a Ray actor."""

    def facts(self, salt: str, run_dir: str, model: str | None) -> dict[str, Any]:
        """Everything that needs no other node. salt: for the token's hash; model: a folder, or None."""
        return {
            "python": platform.python_version(),
            "ray": _version("ray"),
            "torch": _version("torch"),
            "transformers": _version("transformers"),
            "slipstream": _version("slipstream"),
            "sources": source_digest(),
            "native": native_state(),
            "gpus": gpus(),
            "shm_bytes": _disk(MEMORY)[0],
            "shm_free_bytes": _disk(MEMORY)[1],
            "run_free_bytes": _disk(Path(run_dir))[1],
            "sees_run_dir": Path(run_dir).is_dir(),
            "model": None if model is None else folder_digest(Path(model)),
            "auth_mode": auth_mode(),
            "token": token_hash(salt),
            **self._ray_disk(),
        }

    def exists(self, path: str) -> bool:
        """Whether this node sees a file."""
        return Path(path).exists()

    def now_s(self) -> float:
        """This machine's clock."""
        return time.time()

    def listen(self, host: str, answer: str) -> int:
        """Gives `answer` to everybody who connects to the port that it returns, as long as this process lives."""
        server = socket.create_server((host, 0))

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(answer.encode())

        threading.Thread(target=serve, daemon=True).start()
        return int(server.getsockname()[1])

    def reach(self, targets: dict[str, tuple[str, int]], answer: str, timeout_s: float) -> dict[str, str]:
        """By name what went wrong with those that do not answer as they should."""
        with ThreadPoolExecutor(max(1, min(64, len(targets)))) as threads:
            found = threads.map(lambda target: _ask(target[0], target[1], answer, timeout_s), targets.values())
            return {name: error for name, error in zip(targets, found, strict=True) if error}

    def _ray_disk(self) -> dict[str, Any]:
        import ray

        node = getattr(ray._private.worker, "_global_node", None)
        folder = Path(node.get_temp_dir_path()) if node is not None else Path("/tmp")
        total, free = _disk(folder)
        return {"ray_free_bytes": free, "ray_used_share": 1.0 - free / total if total else 1.0}


def auth_mode() -> str:
    """Ray's authentication in this process: token or disabled; a Ray too old for it says so."""
    from ray import _raylet

    raylet: Any = _raylet  # compiled, without types
    if not hasattr(raylet, "AuthenticationMode"):
        return "unknown to this Ray"
    return "token" if raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN else "disabled"


def token_hash(salt: str) -> str:
    """A salted hash of this machine's token, 8 bytes in hex; `none` where there is no token."""
    from ray import _raylet

    raylet: Any = _raylet
    try:
        token = raylet.AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True)
    except Exception:  # Ray raises its own kinds for a missing and for an unreadable file, and older ones lack it
        return "none"
    key = token.encode() if isinstance(token, str) else bytes(token or b"")
    return hashlib.blake2b(key, digest_size=8, salt=salt.encode()[:16]).hexdigest() if key else "none"


def gpus() -> list[str]:
    """One text for each GPU: name, memory, driver. Not through CUDA, which an actor without GPUs may not see."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi failed: {type(error).__name__}"]
    return [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]


def source_digest() -> str:
    """4 bytes in hex over all of this package's Python files: the same code has the same digest."""
    digest = hashlib.blake2b(digest_size=4)
    for room in ROOMS:
        try:
            spec = find_spec(f"slipstream.{room}")
        except ImportError:
            spec = None
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{room}/{path.relative_to(folder).as_posix()}".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def native_state() -> str:
    """Whether the compiled kernels can be loaded."""
    try:
        found = find_spec("slipstream.kernels._native")
    except ImportError:
        found = None
    return "missing" if found is None else "built"


def folder_digest(folder: Path) -> str:
    """4 bytes in hex over names and sizes of a folder's files; `missing` without the folder."""
    if not folder.is_dir():
        return "missing"
    files = sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file())
    return hashlib.blake2b(repr(files).encode(), digest_size=4).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _disk(path: Path) -> tuple[int, int]:
    """(total, free) bytes of the file system that the nearest existing ancestor lies on."""
    existing = next((one for one in (path, *path.parents) if one.exists()), Path(os.sep))
    usage = shutil.disk_usage(existing)
    return usage.total, usage.free


def _ask(host: str, port: int, answer: str, timeout_s: float) -> str:
    """What went wrong, or nothing."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            got = b""
            while chunk := connection.recv(1024):
                got += chunk
    except OSError as error:
        return f"port {port}: {error.strerror or error}"
    return "" if got.decode(errors="replace") == answer else f"port {port}: somebody else answers"

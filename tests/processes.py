"""What the machine knows of running processes: who started whom, and who listens where. Linux."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

LISTENING = "0A"


def descendants(root: int) -> dict[int, str]:
    """Process id and title of everything that a process has started, and that has started in turn."""
    parents, titles = _processes()
    return {pid: title for pid, title in titles.items() if root in _ancestors(pid, parents)}


def _processes() -> tuple[dict[int, int], dict[int, str]]:
    """(parent, title) of every process."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return parents, titles


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    out: list[int] = []
    while (pid := parents.get(pid, 0)) > 0:
        out.append(pid)
    return out


def listening_sockets(root: int) -> set[tuple[str, str]]:
    """(program, address) of every TCP socket that a process or its descendants listen on."""
    owners = {}
    for pid, title in {root: "driver", **descendants(root)}.items():
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    owners[os.readlink(link)] = title
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and (title := owners.get(f"socket:[{fields[9]}]")):
                found.add((title, readable(fields[1].partition(":")[0])))
    return found


def readable(address: str) -> str:
    """Of /proc's hexadecimal words in the machine's order; IPv4 in IPv6 as IPv4."""
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    raw = b"".join(words)
    if len(raw) == 16 and raw[:12] == bytes(10) + b"\xff\xff":
        raw = raw[12:]
    return ".".join(map(str, raw)) if len(raw) == 4 else raw.hex()


def exposed(sockets: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that are not on loopback."""
    return sorted(one for one in sockets if not one[1].startswith("127.") and one[1] != "0" * 31 + "1")

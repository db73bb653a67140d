"""Processes as /proc shows them: whose children they are, and what they are doing.

Invariants: only descendants of a process that the bench has started are ever found; Linux only. Ray writes what an
actor does into its command line (`ray::PolicyLearner.update`), which tells from outside which call it is in.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import defaultdict
from pathlib import Path

WATCH_S = 0.0005
"""Between two looks at a process whose call is waited for: a transfer of weights takes some milliseconds."""


def command_line(pid: int) -> str:
    """The command line with spaces, empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def descendants(roots: list[int]) -> list[int]:
    """The living processes among `roots` and below them, parents first."""
    children: dict[int, list[int]] = defaultdict(list)
    alive = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                alive.add(int(entry.name))
                children[int(parent)].append(int(entry.name))
    found = [root for root in roots if root in alive]
    for pid in found:
        found += sorted(children[pid])
    return found


def titled(roots: list[int], word: str) -> list[int]:
    """The Ray actors below `roots` whose class name ends with `word`, ascending."""
    found = []
    for pid in descendants(roots):
        name = command_line(pid).partition(".")[0]
        if name.startswith("ray::") and name.endswith(word):
            found.append(pid)
    return sorted(found)


def wait_for_call(pids: list[int], call: str, timeout_s: float) -> int | None:
    """The first of `pids` seen in the method `call`, or None when nobody was within timeout_s."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for pid in pids:
            if command_line(pid).endswith(f".{call}"):
                return pid
        time.sleep(WATCH_S)
    return None


def send(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; False when the process is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def kill_tree(root: int) -> None:
    """SIGKILL to a process and everything below it."""
    # Stopped first, so that it starts nothing between the look and the kill.
    send(root, signal.SIGSTOP)
    for pid in descendants([root]):
        send(pid, signal.SIGKILL)

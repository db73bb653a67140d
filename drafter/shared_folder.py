"""Built indexes that all workers of a node share: one builds, the others map the files it wrote.

Invariants
- A file is named after what it was built from (prompt and newest visit), so an old one is never taken for a new one;
  the index puts it in place whole, by one rename.
- A promise (an empty file beside it) is there before the builder's publish returns: a reader that finds neither file
  nor promise builds for itself at once, one that finds a promise waits for it, at most `timeout_s` and as long as the
  builder lives.
- The folder lies in memory (/dev/shm), belongs to one process, which makes it for itself alone and holds its lock, and
  goes with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MEMORY = Path("/dev/shm")
PREFIX = "slipstream-index-"
POLL_S = 0.002

Role = Literal["builder", "reader"]


def make_folder() -> Path:
    """A new folder in memory, locked by this process; what earlier jobs that died have left behind goes first."""
    parent = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    for old in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if old.stat().st_uid == os.getuid() and _lock(old) is not None:
                shutil.rmtree(old, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
        lock = _lock(folder)
        # Another process may have taken the folder for a dead one's before the lock was there.
        if lock is not None and folder.exists():
            _LOCKS.append(lock)
            return folder


_LOCKS: list[int] = []
"""Open for as long as this process lives: the kernel lets go of a lock when its owner dies, in whatever container."""


def _lock(folder: Path) -> int | None:
    """The folder's lock, or None when a living process holds it."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@dataclass(slots=True)
class SharedFolder:
    """One worker's view of the folder. role: exactly one worker of a node is its builder."""

    path: Path
    role: Role
    timeout_s: float = 30.0
    num_mapped: int = 0
    num_missed: int = 0
    _current: dict[str | None, Path] = field(default_factory=dict)

    def index_file(self, prompt_id: str, visit: int, num_records: int) -> Path:
        """Where the frozen tier of a prompt lies. visit: the newest it holds; num_records: all it holds."""
        name = hashlib.blake2b(prompt_id.encode(), digest_size=12).hexdigest()
        return self.path / f"{name}-{visit}-{num_records}.index"

    def text_file(self, version: int) -> Path:
        """Where the shared text lies."""
        return self.path / f"text-{version:012d}.shared"

    def promise(self, name: str | None, file: Path) -> None:
        """Builder: says that `file` is on its way, and removes the one that it replaces. name: prompt_id, None: the
        shared text."""
        with contextlib.suppress(OSError):
            _promise_of(file).touch(mode=0o600)
        old = self._current.get(name)
        self._current[name] = file
        if old is not None and old != file:
            self.remove(old)

    def forget(self, name: str | None) -> None:
        """Builder: removes what lies under `name`; who has mapped it keeps it."""
        old = self._current.pop(name, None)
        if old is not None:
            self.remove(old)

    def remove(self, file: Path) -> None:
        """Removes a file and its promise."""
        for path in (file, _promise_of(file)):
            path.unlink(missing_ok=True)

    def find(self, file: Path) -> bool:
        """Reader: whether `file` is there, after waiting for it if it was promised.

        A builder that has broken one promise is not waited for again.
        """
        deadline = time.monotonic() + self.timeout_s
        while not file.exists():
            if not _promise_of(file).exists():
                return False
            if time.monotonic() > deadline or not self._has_builder():
                self.timeout_s = 0.0
                return False
            time.sleep(POLL_S)
        return True

    def _has_builder(self) -> bool:
        """Whether a process still holds the folder's lock, which its maker holds for life."""
        try:
            lock = _lock(self.path)
        except OSError:
            return False
        if lock is not None:
            os.close(lock)
        return lock is None

    def newest_text(self) -> Path | None:
        """Reader: the newest shared text that is complete."""
        return max(self.path.glob("text-*.shared"), default=None)


def _promise_of(file: Path) -> Path:
    return file.with_name(file.name + ".promised")

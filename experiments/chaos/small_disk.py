"""A file system of its own for the run folder, which can be filled up.

Invariants: what fills it is one file, and `free` gives back all of its room; `close` unmounts it. Mounting takes root;
without, `full` is answered by a limit on the size of files, and `kind` says so.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

DISK_BYTES = 96 << 20
FILLER = "filler"
FILL_ATTEMPTS = 100


class SmallDisk:
    """A tmpfs at `folder`, or a plain folder where nothing can be mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(folder)]
        self._mounted = shutil.which("mount") is not None and (
            subprocess.run(mount, capture_output=True, timeout=30, check=False).returncode == 0
        )
        self._limited: list[int] = []

    @property
    def kind(self) -> str:
        """What "full" means here."""
        return f"tmpfs of {DISK_BYTES >> 20} MiB" if self._mounted else "limit on the size of files"

    def fill(self, room: int, pids: Iterable[int]) -> None:
        """Leaves `room` bytes; where nothing is mounted, files that `pids` write stay below that size."""
        if self._mounted:
            self._fill_up(room)
            return
        for pid in pids:
            self._limited.append(pid)
            _limit_files(pid, room)

    def _fill_up(self, room: int) -> None:
        with (self.folder / FILLER).open("wb") as file:
            # The job writes meanwhile: what was free when it was asked may not be when it is taken.
            for _ in range(FILL_ATTEMPTS):
                free = shutil.disk_usage(self.folder).free - room
                if free <= 0:
                    return
                try:
                    os.posix_fallocate(file.fileno(), 0, free)
                    return
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        raise RuntimeError(f"{self.folder} could not be filled up to {room} bytes in {FILL_ATTEMPTS} attempts")

    def free(self) -> None:
        """Ends `fill`."""
        (self.folder / FILLER).unlink(missing_ok=True)
        for pid in self._limited:
            _limit_files(pid, resource.RLIM_INFINITY)
        self._limited.clear()

    def close(self) -> None:
        """Unmounts; what lies on the disk is gone."""
        if self._mounted:
            subprocess.run(["umount", str(self.folder)], capture_output=True, timeout=30, check=False)
            self._mounted = False


def _limit_files(pid: int, size: int) -> None:
    try:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    except ProcessLookupError:
        return

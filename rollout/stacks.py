"""Where the threads of this process are.

Invariants: needs neither the main thread nor an engine lock, so that it answers while both are stuck; changes nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback


def thread_stacks() -> str:
    """The Python stack of every thread, the calling one left out, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [f"process {os.getpid()}"]
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts.append(f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame)).rstrip()}")
    return "\n".join(parts)

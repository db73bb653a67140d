"""The watchdog: silent while there is progress; a stall is written down and ends the job."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from slipstream.rollout.stacks import thread_stacks
from slipstream.trainer.watchdog import STALL_FILE, Watchdog


def test_a_stall_is_written_down_before_the_job_ends(tmp_path: Path) -> None:
    ended = threading.Event()
    stuck = threading.Event()

    def a_function_that_hangs() -> None:
        stuck.wait(30)

    threading.Thread(target=a_function_that_hangs, daemon=True).start()
    dog = Watchdog(0.3, tmp_path, ended.set)
    dog.describe(lambda: "uids in flight: [17]")
    dog.describe(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    dog.describe(lambda: "after the failing part")
    with dog:
        dog.progress("8 rollouts of step 3")
        assert ended.wait(20)
        text = (tmp_path / STALL_FILE).read_text()
    stuck.set()
    assert dog.stalled is not None
    assert "8 rollouts of step 3" in dog.stalled
    assert "watchdog.timeout_s=0.3" in dog.stalled
    for part in (
        dog.stalled,
        "a_function_that_hangs",
        "uids in flight: [17]",
        "ZeroDivisionError",
        "after the failing",
    ):
        assert part in text


def test_it_ends_a_job_that_a_script_put_into_the_background(tmp_path: Path) -> None:
    """There SIGINT is ignored from the start; the main thread waits in a system call."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from slipstream.trainer.watchdog import Watchdog\n"
        "try:\n"
        "    with Watchdog(0.3, sys.argv[1]):\n"
        "        time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    command = [
        sys.executable,
        "-c",
        f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{code}",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert done.stdout == "interrupted\n", done.stderr


def test_progress_keeps_it_quiet(tmp_path: Path) -> None:
    ended = threading.Event()
    with Watchdog(1.0, tmp_path, ended.set) as dog:
        for _ in range(15):
            time.sleep(0.1)
            dog.progress("a step")
    assert not ended.is_set()
    assert not (tmp_path / STALL_FILE).exists()


def test_zero_turns_it_off(tmp_path: Path) -> None:
    with Watchdog(0.0, tmp_path) as dog:
        time.sleep(0.05)
    assert dog.stalled is None


def test_stacks_name_the_other_threads() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, args=(30,), name="the waiting one", daemon=True)
    thread.start()
    text = thread_stacks()
    release.set()
    assert "the waiting one" in text
    assert "test_stacks_name_the_other_threads" not in text

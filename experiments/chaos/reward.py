"""The reward function of the disturbed job: exact match, and now and then it never returns.

Invariants: a hang is asked for from outside, by a file, and taken by exactly one call; whatever hangs, a call that
returns gives the reward of exact match.
"""

from __future__ import annotations

import os
import time
from typing import Any

from slipstream.trainer.data.rewards import is_exact

HANG_VARIABLE = "SLIPSTREAM_CHAOS_HANG"
"""Environment variable with the path of the file that asks for a hang."""


def score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None) -> float:
    """As verl calls it. Hangs where the file is there, which it removes."""
    try:
        os.unlink(os.environ[HANG_VARIABLE])
    except (KeyError, FileNotFoundError):
        return float(is_exact(solution_str, ground_truth))
    while True:
        time.sleep(3600)

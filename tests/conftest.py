"""What every test may count on: no network, no thread storms, and property tests without a stopwatch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Set before torch and the Hugging Face libraries read them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# Triton reads this when it is first imported, which transformers does on its own. A machine with a GPU compiles.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is no reason for a failure, so examples have no deadline.
settings.register_profile("slipstream", deadline=None, print_blob=True)
settings.load_profile("slipstream")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout that the tests lie in."""
    return Path(__file__).resolve().parents[1]

"""Every Triton kernel compiles for Hopper as the engine launches it: what the interpreter cannot show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slipstream.kernels import dispatch

KERNELS = Path(dispatch.__file__).parent / "triton"


@pytest.fixture(scope="module")
def compiled(repo_root: Path) -> list[dict[str, Any]]:
    """Triton reads TRITON_INTERPRET once, at import: compiling needs a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.hopper_compiler"]
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled(compiled: list[dict[str, Any]]) -> None:
    """A launch from the host is a name ending in _kernel before its grid."""
    written = {
        line.split("[")[0].split("=")[-1].strip()
        for path in KERNELS.glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "_kernel[" in line
    }
    assert len(written) >= 10
    # The noise alone is launched by tests only.
    assert written - {"_gumbel_kernel"} == {facts["kernel"] for facts in compiled}


def test_nothing_spills_and_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    for facts in compiled:
        assert facts["spilled"] == 0, facts
        assert facts["shared"] <= 227 * 1024, facts


def test_attention_of_drafts_uses_the_matrix_units(compiled: list[dict[str, Any]]) -> None:
    drafts = [f for f in compiled if f["launch"] in ("attend_8", "attend_32") and f["kernel"] == "_attend_kernel"]
    assert len(drafts) == 2
    assert all(facts["wgmma"] for facts in drafts)

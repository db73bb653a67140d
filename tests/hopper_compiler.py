"""Compiles the Triton kernels for a Hopper GPU without one: run as a script, it prints one JSON line a kernel.

Every launch of a wrapper becomes a compilation with the very arguments it would have had: types, constants and
divisibility are those of a real call, and nothing runs. Triton must have been imported without its interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

TARGET = GPUTarget("cuda", 90, 32)


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def spilled_bytes(ptx: str) -> int:
    """Bytes that the assembler spills to local memory."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", source.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr))


def compile_launches(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """Name, spilled bytes and shared memory of every kernel that `call` launches, in order."""
    found: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        facts = {"kernel": self.fn.__name__, "shared": kernel.metadata.shared}
        found.append(facts | {"spilled": spilled_bytes(kernel.asm["ptx"]), "ptx": kernel.asm["ptx"]})
        return kernel

    driver.set_active(NoDevice())
    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return found


def launches() -> dict[str, Callable[[], Any]]:
    """One call of every kernel as the engine makes it, at the shapes of a small Qwen in bfloat16."""
    from tests.hopper_launches import LAUNCHES

    return LAUNCHES


if __name__ == "__main__":
    for name, call in launches().items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        for facts in compile_launches(call):
            ptx = facts.pop("ptx")
            print(json.dumps({"launch": name, **facts, "wgmma": "wgmma" in ptx}), flush=True)

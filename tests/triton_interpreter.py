"""Triton for tests: compiled where there is a GPU, else run by its interpreter on the CPU.

Without Triton the importing test module is skipped; Triton that was imported with the interpreter off is an error,
because tests/conftest.py sees to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from triton.runtime import interpreter  # noqa: E402

import slipstream.kernels.triton  # noqa: E402, F401  (makes the interpreter take NumPy's newer releases)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and isinstance(triton.language.sum, triton.JITFunction):
    raise RuntimeError("triton was imported with TRITON_INTERPRET unset; tests/conftest.py sets it where no GPU is")


def make_rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose rows do not depend on their place in the tile, like a GPU's and unlike that of a CPU's BLAS."""

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = (a.data[:, :, None] * b.data[None]).sum(1, dtype=np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)

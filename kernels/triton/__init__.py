"""The GPU kernels, one file each. Importing this needs Triton; with TRITON_INTERPRET=1 they run on a CPU.

Invariant: where kernels are compiled, nothing of Triton is touched.
"""

from __future__ import annotations

from typing import Any

import triton

if triton.knobs.runtime.interpret:
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _with_scalar_loop_bounds(tensor: Any, scope: Any) -> None:
        """The interpreter of Triton 3.6 turns one-element arrays into integers in a way that NumPy 2.4 refuses."""
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _with_scalar_loop_bounds

"""Triton kernel of reference.silu_mul: silu(gate) * up in one pass, where torch takes two.

Invariant: rounded as torch rounds it, silu(gate) to the dtype of gate first and then the product; elementwise.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are values of the device: no Python type names them)
from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate, up, out, num, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    value = (value / (1.0 + tl.exp(-value))).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (value * factor).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up: of one shape and dtype. Raises ValueError where they differ."""
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):
        raise ValueError(f"up is {up.dtype} {list(up.shape)}; allowed: {gate.dtype} {list(gate.shape)}, as gate")
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        with torch.cuda.device_of(gate):
            _silu_mul_kernel[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out

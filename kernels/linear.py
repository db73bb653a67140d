"""Linear layers and RMS norms whose bits do not depend on how many rows they are given, with their plain twins.

Invariants
- A row of the result is a function of that row of x and of the weights alone: tiles and the order of every sum follow
  from the layer's widths and dtype, never from the number of rows.
- Products and sums are float32, the result is rounded once (a norm that multiplies by its weight after rounding
  rounds twice, as the model's own does).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels import reference
from slipstream.kernels.dispatch import Backend, pick_backend


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """x @ weight.T + bias: [..., N] in the dtype of x, without gradients.

    x: [..., K]; weight: [N, K]; bias: [N] or None; all of one dtype (float32, bfloat16 or float16) on one device.
    Raises ValueError for other shapes, dtypes and backends.
    """
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    _check(x, tensors)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {list(weight.shape)}; allowed: [N, {x.shape[-1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; allowed: [{weight.shape[0]}]")
    if pick_backend(backend, x.device) == "reference":
        return reference.linear(x, weight, bias)
    from slipstream.kernels.triton.linear import launch_linear

    rows = x.reshape(-1, x.shape[-1])
    return launch_linear(rows.contiguous(), weight, bias).view(*x.shape[:-1], weight.shape[0])


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool = False,
    round_first: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times the weight, along the last axis, in the dtype of x, without gradients.

    weight: [D], of the dtype of x. unit_offset: the factor is 1 + weight (Gemma). round_first: the quotient is rounded
    to the dtype of x before it is multiplied (Llama, Qwen); else only the product is (Gemma). Raises ValueError for
    other shapes, dtypes and backends.
    """
    _check(x, {"weight": weight})
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}; allowed: [{x.shape[-1]}]")
    if pick_backend(backend, x.device) == "reference":
        return reference.rms_norm(x, weight, eps, unit_offset, round_first)
    from slipstream.kernels.triton.linear import launch_rms_norm

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return launch_rms_norm(rows, weight, eps, unit_offset, round_first).view(x.shape)


def _check(x: Tensor, tensors: dict[str, Tensor]) -> None:
    if x.dim() == 0 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}; allowed: [..., K], torch.float32, torch.bfloat16 or torch.float16"
        )
    for name, tensor in tensors.items():
        if (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; allowed: {x.dtype} on {x.device}, as x")

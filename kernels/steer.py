"""The steering rotation as plain torch, and its entry point.

Invariants
- A vector is either rotated with its norm kept, or returned bit-equal: masked heads and tokens, strength 0, zero or
  non-finite vectors, zero directions, and a vector of which nothing is left.
- All arithmetic is float32; the result is rounded once to the dtype of x.
- A backend asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slipstream.kernels.dispatch import Backend, pick_backend

VANISHED = 2.0**-20
"""A remainder below this share of a vector's norm is rounding noise: restoring its norm would invent a direction."""


def steer(
    x: Tensor,
    directions: Tensor,
    strength: Tensor | float,
    mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    inplace: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Rotates each head's vector towards or away from its directions and keeps its norm: [T, heads, D], dtype of x.

    CREST's steering without a gate (arXiv 2512.24574; its released code, mode `after_o_proj_no_awareness_norm`): with
    v = direction / ||direction||, y = x + c (x . v) v for each direction in turn, then y ||x|| / ||y|| once, which
    equals restoring the norm after each. c = -1 removes the component, below -1 flips it, above 0 strengthens it. The
    released code steers the whole output of o_proj with the vectors of all selected heads of a layer: x [T, 1, D] and
    directions [1, R, D].

    x: [T, heads, D], float32 or bfloat16, any strides; directions: [heads, D], or [heads, R, D] to apply R in turn;
    strength: c, one number or a tensor of directions.shape[:-1]; mask: bool of that shape, which of them apply;
    token_mask: [T] bool, which tokens are steered; None: all. inplace: writes into x and returns it. Gradients flow to
    x alone; the rest are constants. The norm restored must be representable: the product of all |1 + c| of a head
    below 1e18.

    Raises ValueError for wrong shapes, dtypes, devices and backends, and for inplace while x records gradients.
    """
    directions, strength, mask = _prepare(x, directions, strength, mask, token_mask)
    records = x.requires_grad and torch.is_grad_enabled()
    if inplace and records:
        raise ValueError("inplace is True for an x that requires a gradient; allowed: False, or no_grad")
    if pick_backend(backend, x.device) == "reference":
        result = _rotate(x, directions, strength, mask, token_mask)
        return x.copy_(result) if inplace else result
    if records:
        return _Steer.apply(x, directions, strength, mask, token_mask)
    from slipstream.kernels.triton.steer import launch

    return launch(x, directions, strength, mask, token_mask, inplace)


def steer_reference(
    x: Tensor,
    directions: Tensor,
    strength: Tensor | float,
    mask: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The plain twin of `steer`, differentiable in x, on any device; arguments, result and errors as there."""
    return _rotate(x, *_prepare(x, directions, strength, mask, token_mask), token_mask)


def _rotate(x: Tensor, directions: Tensor, strength: Tensor, mask: Tensor, token_mask: Tensor | None) -> Tensor:
    """directions: [heads, R, D]; strength: [heads, R] float32; mask: [heads, R] bool."""
    value = x.float()
    # Squares of anything above 1e19 overflow float32, so that norms are taken of x over its largest element.
    scale = _peak(value.detach())
    start = turned = value / scale
    vectors = directions.float()
    vectors = vectors / _peak(vectors)
    squares = vectors.square().sum(-1)
    applies = mask & (strength != 0) & (squares > 0)
    share = torch.where(applies, strength / torch.where(squares > 0, squares, 1.0), 0.0)
    for index in range(vectors.shape[1]):
        along = (turned * vectors[:, index]).sum(-1, keepdim=True)
        turned = turned + share[:, index, None] * along * vectors[:, index]
    norm = torch.linalg.vector_norm(start, dim=-1, keepdim=True)
    turned_norm = torch.linalg.vector_norm(turned, dim=-1, keepdim=True)
    changed = applies.any(-1)[None, :, None] & (turned_norm > VANISHED * norm)
    if token_mask is not None:
        changed = changed & token_mask[:, None, None]
    restored = turned * (norm / torch.where(changed, turned_norm, 1.0)) * scale
    return torch.where(changed, restored.to(x.dtype), x)


def _peak(values: Tensor) -> Tensor:
    """Largest magnitude along the last axis, kept as an axis; 1 for a vector of zeros or of no elements."""
    if values.shape[-1] == 0:
        return values.new_ones((*values.shape[:-1], 1))
    peak = values.abs().amax(-1, keepdim=True)
    return torch.where(peak > 0, peak, 1.0)


class _Steer(torch.autograd.Function):
    """Triton forward; the gradient is that of the plain twin, computed again from x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, directions: Tensor, strength: Tensor, mask: Tensor, token_mask: Tensor | None
    ) -> Tensor:
        from slipstream.kernels.triton.steer import launch

        ctx.save_for_backward(x, directions, strength, mask, token_mask)
        return launch(x, directions, strength, mask, token_mask, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            result = _rotate(x, *rest)
        return torch.autograd.grad(result, x, grad)[0], None, None, None, None


def _prepare(
    x: Tensor, directions: Tensor, strength: Tensor | float, mask: Tensor | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """directions [heads, R, D], strength [heads, R] float32 and mask [heads, R] bool, without gradients."""
    if x.dim() != 3 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; allowed: torch.float32 or torch.bfloat16 [T, heads, D]")
    num_tokens, num_heads, width = x.shape
    shape = tuple(directions.shape)
    if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (num_heads, width) or not directions.is_floating_point():
        raise ValueError(
            f"directions are {directions.dtype} {list(shape)}; "
            f"allowed: floating point [{num_heads}, {width}] or [{num_heads}, R, {width}]"
        )
    if not isinstance(strength, Tensor):
        strength = torch.full(shape[:-1], float(strength), dtype=torch.float32, device=x.device)
    if strength.shape != shape[:-1] or not strength.is_floating_point():
        raise ValueError(
            f"strength is {strength.dtype} {list(strength.shape)}; "
            f"allowed: a number, or floating point {list(shape[:-1])}"
        )
    if mask is None:
        mask = torch.ones(shape[:-1], dtype=torch.bool, device=x.device)
    if mask.shape != shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; allowed: torch.bool {list(shape[:-1])}")
    if token_mask is not None and (token_mask.shape != (num_tokens,) or token_mask.dtype != torch.bool):
        raise ValueError(
            f"token_mask is {token_mask.dtype} {list(token_mask.shape)}; allowed: torch.bool [{num_tokens}]"
        )
    others = {"directions": directions, "strength": strength, "mask": mask, "token_mask": token_mask}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {x.device}, where x is")
    rows = (num_heads, -1)
    if len(shape) == 2:
        directions, rows = directions[:, None], (num_heads, 1)
    return directions.detach(), strength.detach().float().reshape(rows), mask.reshape(rows)

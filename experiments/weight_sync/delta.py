"""Which share of the weights lies in changed blocks after an update: what sending changes only can save.

Invariants: the optimiser is torch's AdamW, on float32 masters; gradients are random, so nothing is assumed about which
elements move; a share counts the 8 bytes of checksum that each sent block brings along.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from slipstream.kernels.checksum import block_checksums
from slipstream.rollout.weight_handle import as_bytes

NUM_ELEMENTS = 1 << 22
WEIGHT_STD = 0.02
BLOCK_BYTES = (64, 1024, 65536)
LEARNING_RATES = (1e-6, 1e-7)
NUM_STEPS = 8
CHECKSUM_BYTES = 8


def delta_shares() -> dict[str, Any]:
    """Bytes sent over bytes of all, by dtype, learning rate and bytes of a block; means over the last steps."""
    out: dict[str, Any] = {}
    for rate in LEARNING_RATES:
        versions = adam_versions(rate)
        for dtype in (torch.float32, torch.bfloat16):
            served = [as_bytes(version.to(dtype)) for version in versions]
            name = f"{str(dtype).removeprefix('torch.')}_lr_{rate:g}"
            pairs = list(pairwise(served))[NUM_STEPS // 2 :]
            out[name] = {
                f"block_{size}": float(np.mean([sent_share(old, new, size) for old, new in pairs]))
                for size in BLOCK_BYTES
            }
            elements = [old.view(dtype) != new.view(dtype) for old, new in pairs]
            out[name]["elements_changed"] = float(np.mean([float(one.float().mean()) for one in elements]))
    return out


def adam_versions(learning_rate: float) -> list[torch.Tensor]:
    """The master weights after each of NUM_STEPS updates, the first before any."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(WEIGHT_STD * torch.randn(NUM_ELEMENTS, generator=generator))
    optimizer = torch.optim.AdamW([weights], lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    versions = [weights.detach().clone()]
    for _ in range(NUM_STEPS):
        weights.grad = torch.randn(NUM_ELEMENTS, generator=generator)
        optimizer.step()
        versions.append(weights.detach().clone())
    return versions


def sent_share(old: torch.Tensor, new: torch.Tensor, block_bytes: int) -> float:
    """Bytes of the changed blocks and their checksums over all bytes. old, new: flat uint8 of one size."""
    changed = int(np.count_nonzero(block_checksums(old, block_bytes) != block_checksums(new, block_bytes)))
    return changed * (block_bytes + CHECKSUM_BYTES) / len(new)

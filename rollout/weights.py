"""The policy's weights as the engine serves them: adopted, copied in place or patched.

Invariants
- Weights that do not fit are refused before the first one is touched.
- `copy_from` and `patch` leave every tensor where it is (CUDA graphs read it there), unless it was adopted before.
- Adopted memory is never written: it may be shared with other processes. What changes it gets its own copy first.
- Every change counts in the tensor's version, which is what packed layers look at; tied tensors stay tied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from slipstream.rollout.engine import EngineError, Patch


class WeightTable:
    """The parameters and buffers of one model by name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = dict(model.state_dict(keep_vars=True))
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        # By identity, not by name: a tied tensor has several.
        self._adopted: set[int] = set()

    def check(self, shapes: Mapping[str, tuple[int, ...]], version: int) -> None:
        """Raises EngineError naming a missing, unknown or misshapen tensor."""
        if shapes == self._shapes:
            return
        unknown = sorted(set(shapes) - set(self._tensors))
        if unknown:
            raise EngineError(f"weights of version {version} hold {unknown[0]!r}, which the model does not have")
        tied = {id(self._tensors[name]) for name in shapes}
        missing = sorted(name for name, tensor in self._tensors.items() if id(tensor) not in tied)
        if missing:
            raise EngineError(f"weights of version {version} lack {missing[0]!r}")
        for name, shape in shapes.items():
            if tuple(shape) != tuple(self._tensors[name].shape):
                raise EngineError(
                    f"weights of version {version}: {name!r} is {tuple(shape)}, "
                    f"the model has {tuple(self._tensors[name].shape)}"
                )

    def copy_from(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Copies the weights in place. Raises EngineError as `check`."""
        self.check({name: tuple(tensor.shape) for name, tensor in weights.items()}, version)
        self._own(weights, keep=False)
        with torch.no_grad():
            for name, tensor in weights.items():
                self._tensors[name].copy_(tensor)

    def adopt(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """The model computes with these very tensors from now on, where dtype, device and layout are its own; the
        others are copied in place. They must not change while they are referenced. Raises EngineError as `check`."""
        self.check({name: tuple(tensor.shape) for name, tensor in weights.items()}, version)
        adopted = []
        for name, tensor in weights.items():
            own = self._tensors[name]
            if (tensor.dtype, tensor.device, tensor.is_contiguous()) == (own.dtype, own.device, own.is_contiguous()):
                own.data = tensor
                adopted.append(own)
            else:
                self._own([name], keep=False)
                with torch.no_grad():
                    own.copy_(tensor)
        self._adopted.update(map(id, adopted))
        # Another tensor's memory does not count as a change by itself.
        torch.autograd.graph.increment_version(adopted)

    def patch(self, patches: Mapping[str, Patch]) -> None:
        """Writes new blocks. Names, sizes and contiguity are checked before. Raises EngineError."""
        for name, patch in patches.items():
            tensor = self._tensors.get(name)
            if tensor is None or not tensor.is_contiguous() or patch.block_elements < 1:
                raise EngineError(f"a patch of {name!r} does not fit the model: no such tensor, or not in one piece")
        self._own(patches, keep=True)
        with torch.no_grad():
            for name, patch in patches.items():
                _write_blocks(self._tensors[name].view(-1), patch)

    def _own(self, names: Iterable[str], keep: bool) -> None:
        """Memory of their own for tensors that were adopted; with their values if `keep`."""
        for tensor in (self._tensors[name] for name in names):
            if id(tensor) in self._adopted:
                tensor.data = tensor.data.clone() if keep else torch.empty_like(tensor.data)
                torch.autograd.graph.increment_version(tensor)
                self._adopted.discard(id(tensor))


def _write_blocks(flat: torch.Tensor, patch: Patch) -> None:
    new, size = patch.data.view(patch.dtype), patch.block_elements
    whole = len(flat) // size
    inside = patch.blocks[patch.blocks < whole]
    rows = torch.from_numpy(inside).to(flat.device)
    values = new[: len(inside) * size].view(-1, size).to(flat.device, flat.dtype)
    flat[: whole * size].view(-1, size).index_copy_(0, rows, values)
    if len(inside) < len(patch.blocks):
        flat[whole * size :].copy_(new[len(inside) * size :])

"""Weights as safetensors files on a folder that learner and workers share.

Invariants: a file has its name only once it is whole (written beside it and renamed), and is never written again; a
killed writer leaves a file that no name leads to, which the next one removes; nothing is pickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slipstream.rollout.weight_handle import Arrays, WeightError, as_bytes

PATTERN = "weights-*"


@dataclass(frozen=True)
class FilePayload:
    """path: as the learner sees it, and the workers too; num_bytes: of the file."""

    path: str
    num_bytes: int
    same_pages: ClassVar[bool] = True
    adoptable: ClassVar[bool] = False
    """Whoever cut the file would kill a process that computes with its pages: they are copied."""

    def receive(self, timeout_s: float) -> Arrays:
        """The file's tensors, mapped."""
        try:
            size = os.stat(self.path).st_size
            if size != self.num_bytes:
                raise WeightError(f"weights in {self.path}: the file has {size} bytes, {self.num_bytes} were written")
            with safe_open(self.path, framework="pt") as file:
                return {key: as_bytes(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise WeightError(f"weights in {self.path}: {type(error).__name__}: {error}") from error


def write_tensors(folder: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> FilePayload:
    """Writes CPU tensors to folder/weights-NAME.safetensors."""
    path = folder / f"weights-{name}.safetensors"
    draft = path.with_suffix(".writing")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, draft)
    size = draft.stat().st_size
    os.replace(draft, path)
    return FilePayload(str(path), size)


def remove_others(folder: Path, keep: Iterable[str]) -> None:
    """Removes all weights of the folder, drafts too, but the files named by their paths."""
    kept = set(keep)
    for path in folder.glob(PATTERN):
        if str(path) not in kept:
            path.unlink(missing_ok=True)

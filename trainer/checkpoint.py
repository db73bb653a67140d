"""Checkpoints that exist whole or not at all.

Invariants
- A folder `checkpoints/step_000010` is put in place by one rename, after every file in it is on disk and
  `COMPLETE` lists each file's size and checksum. Killing the process at any moment leaves the earlier
  checkpoints as they were.
- `latest` returns only what verifies; what does not is named in a warning and passed over.
- The best checkpoints by a metric are never pruned while they are the best; `best.json` names them, and each marker
  holds the value that it was judged by.
- Nothing is pickled: tensors travel as safetensors.
- One process writes to a run folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from slipstream.trainer.errors import CheckpointError

FOLDER = "checkpoints"
MARKER = "COMPLETE"
BEST_FILE = "best.json"
FORMAT = 1

_NAME = re.compile(r"step_(\d{6,})(\.replaced)?")
_HIDDEN = ".partial-"
_CHUNK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Best:
    """Which checkpoints are worth keeping longer: the `count` whose `metric` is highest (mode max) or lowest (min).

    value: of the checkpoint that is being saved; None or not finite: it is no candidate."""

    metric: str
    mode: Literal["max", "min"]
    count: int
    value: float | None


def save(run_dir: Path, step: int, write: Callable[[Path], None], keep_last: int, best: Best | None = None) -> Path:
    """Writes the checkpoint of `step` and returns its folder; keeps the newest `keep_last` up to this step, and the
    best ones.

    write: fills the folder it is given, which lies on the file system of the run. Raises CheckpointError
    when a file cannot be written (disk full, read-only); the earlier checkpoints stay. Any other error of
    `write` passes through.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; allowed: at least 1")
    parent = Path(run_dir) / FOLDER
    target = parent / f"step_{step:06d}"
    partial: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(f"{_HIDDEN}*"):
            # The learner of a killed job may still be writing there for a moment: then the next save removes it.
            shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=parent))
        write(partial)
        _seal(partial, step, best)
        _put_in_place(partial, target)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(_failure(parent, target, error)) from error
        raise
    try:
        _prune(parent, step, keep_last, best)
    except OSError as error:
        _log.warning("checkpoint %s is written, but an older one cannot be removed: %s", target, error)
    return target


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; each damaged one on the way is named in a warning."""
    for _, path in _candidates(Path(run_dir) / FOLDER):
        try:
            verify(path)
        except CheckpointError as error:
            _log.warning("%s; it is passed over", error)
        else:
            return path
    return None


def verify(path: Path) -> int:
    """Checks every file against `COMPLETE` and returns the step; CheckpointError names the first fault."""
    path = Path(path)
    try:
        marker = json.loads((path / MARKER).read_bytes())
        step, files = int(marker["step"]), dict(marker["files"])
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} is incomplete: it has no {MARKER} file") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MARKER} cannot be read ({error})") from error
    if marker.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {marker.get('format')!r}; allowed: {FORMAT}")
    for name, expected in files.items():
        file = path / name
        try:
            if file.stat().st_size != expected["size"]:
                found = file.stat().st_size
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} has {found} bytes instead of {expected['size']}"
                )
            if _checksum(file) != expected["blake2b"]:
                raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {name} differs")
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} is damaged: {name}: {error.strerror}") from error
    return step


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors of any device and layout as one safetensors file; shared memory is stored twice."""
    seen: set[int] = set()
    ready = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        # safetensors refuses shared storage (tied weights, views), because it could not restore the sharing.
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    save_file(ready, path)


def copy_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in host memory of their own; names of one tensor (tied weights) share one copy."""
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    out = {}
    for name, tensor in tensors.items():
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in copies or not tensor.numel():
            copies[key] = tensor.detach().to("cpu", copy=True)
        out[name] = copies[key]
    return out


def load_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Reads what `save_tensors` wrote; raises CheckpointError when the file is missing or damaged."""
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of any torch optimizer as flat named tensors, the inverse of `restore_optimizer`.

    Keys: `num_params`; `lr.{group}`; `state.{i}.{name}`, where i counts the parameters through all groups.
    Tensors keep their type and are not copied; Python numbers become 0-dimensional float64, which is exact
    for both.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    flat = {"num_params": torch.tensor(len(params))}
    for index, group in enumerate(optimizer.param_groups):
        flat[f"lr.{index}"] = torch.as_tensor(group["lr"], dtype=torch.float64)
    for index, param in enumerate(params):
        for name, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):
                flat[f"state.{index}.{name}"] = value
            elif isinstance(value, int | float):
                flat[f"state.{index}.{name}"] = torch.tensor(value, dtype=torch.float64)
            elif value is not None:
                kind = type(value).__name__
                raise TypeError(f"optimizer state {name!r} is a {kind}; allowed: tensors and numbers")
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts the state of `flatten_optimizer` into an optimizer over the same parameters in the same order.

    The optimizer is changed only when all of it fits; raises CheckpointError naming the first thing that
    does not.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    saved = int(tensors["num_params"]) if "num_params" in tensors else 0
    if saved != len(params):
        raise CheckpointError(f"optimizer state is for {saved} parameters; this optimizer has {len(params)}")
    num_groups = sum(key.startswith("lr.") for key in tensors)
    if num_groups != len(optimizer.param_groups):
        raise CheckpointError(
            f"optimizer state has {num_groups} parameter groups; this one has {len(optimizer.param_groups)}"
        )
    capturable = {
        param: group.get("capturable") or group.get("fused")
        for group in optimizer.param_groups
        for param in group["params"]
    }
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind != "state":
            continue
        index, _, name = rest.partition(".")
        param = params[int(index)]
        if tensor.dim() > 0 and tensor.shape != param.shape:
            raise CheckpointError(
                f"optimizer state {key} has shape {tuple(tensor.shape)}; its parameter has {tuple(param.shape)}"
            )
        # load_state_dict would cast moments to the parameter's type: float32 moments of a bfloat16 model
        # would lose their precision. Step counters live on the CPU unless the update is one fused kernel.
        device = param.device if name != "step" or capturable[param] else torch.device("cpu")
        state.setdefault(int(index), {})[name] = tensor.to(device, copy=True)
    optimizer.state.clear()
    for position, values in state.items():
        optimizer.state[params[position]] = values
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = float(tensors[f"lr.{number}"])


def _seal(partial: Path, step: int, best: Best | None) -> None:
    """Brings every file to disk, then writes the marker that lists them."""
    marker = partial / MARKER
    if marker.exists():
        raise ValueError(f"a checkpoint may not hold a file called {MARKER}: it is the mark of completeness")
    os.chmod(partial, 0o755)  # mkdtemp makes folders that only the owner can read
    files = {}
    folders = [partial]
    for path in sorted(partial.rglob("*")):
        if path.is_dir():
            folders.append(path)
        else:
            _sync(path)
            name = path.relative_to(partial).as_posix()
            files[name] = {"size": path.stat().st_size, "blake2b": _checksum(path)}
    content: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    if best is not None and best.value is not None and math.isfinite(best.value):
        content["metric"] = {"name": best.metric, "value": best.value}
    marker.write_text(json.dumps(content, indent=1) + "\n")
    _sync(marker)
    for folder in folders:
        _sync(folder)


def _put_in_place(partial: Path, target: Path) -> None:
    """Renames the sealed folder to its name; until then an older checkpoint of the same step stays."""
    replaced = target.with_name(f"{target.name}.replaced")
    if target.exists():
        _discard(replaced)
        os.rename(target, replaced)
    os.rename(partial, target)
    _sync(target.parent)
    _discard(replaced)


def _prune(parent: Path, step: int, keep_last: int, best: Best | None) -> None:
    """Removes all but the newest `keep_last` and the best complete checkpoints among those up to `step`.

    Later ones are left alone: after a resume from an earlier step they are the damaged or the unwanted, and
    counting them would push out the good ones.
    """
    complete = [path for number, path in _candidates(parent) if number <= step and (path / MARKER).is_file()]
    ranked = _ranked(complete, best)[: best.count] if best is not None else []
    if best is not None and best.count:
        entries = [{"folder": path.name, "value": value} for value, path in ranked]
        _replace(parent / BEST_FILE, {"metric": best.metric, "mode": best.mode, "best": entries})
    else:
        (parent / BEST_FILE).unlink(missing_ok=True)
    kept = {path for _, path in ranked}
    for path in complete[keep_last:]:
        if path not in kept:
            _discard(path)


def _ranked(complete: list[Path], best: Best) -> list[tuple[float, Path]]:
    """(value, folder) of the checkpoints that were judged by the metric, best first; of equals the newer."""
    found = []
    for path in complete:
        try:
            metric = json.loads((path / MARKER).read_bytes()).get("metric")
        except (ValueError, AttributeError):
            continue  # damaged, as `latest` will say
        if metric is not None and metric["name"] == best.metric:
            found.append((float(metric["value"]), path))
    return sorted(found, key=lambda entry: -entry[0] if best.mode == "max" else entry[0])


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    new = path.with_name(f"{_HIDDEN}{path.name}")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def _discard(path: Path) -> None:
    """Removes a checkpoint; hidden first, so that a kill half-way leaves no folder that looks like one."""
    if not path.exists():
        return
    hidden = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=path.parent))
    os.rename(path, hidden / path.name)
    shutil.rmtree(hidden)


def _candidates(parent: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all that is named like a checkpoint, newest first, replaced ones after successors."""
    found = []
    for path in parent.glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _failure(parent: Path, target: Path, error: Exception) -> str:
    """One line: what failed, what it needs and what there is, and what can be resumed from."""
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    complete = [path for _, path in _candidates(parent) if (path / MARKER).is_file()] if parent.is_dir() else []
    parts = [f"checkpoint {target} cannot be written: {reason}"]
    if complete:
        needed = sum(path.stat().st_size for path in complete[0].rglob("*") if path.is_file())
        parts.append(f"about {needed} bytes needed (size of {complete[0].name})")
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    parts.append(f"{shutil.disk_usage(existing).free} bytes free")
    parts.append(f"last complete: {complete[0].name if complete else 'none'}")
    return "; ".join(parts)


def _checksum(path: Path) -> str:
    """blake2b of a file in hex, 16 bytes: against rot and torn writes, not against an attacker."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Weights by broadcast: nccl between GPUs, gloo between CPUs, with process groups of their own.

Invariants
- Whoever wants a frame says so in the learner's store; the learner answers with a group of those who have said so. So
  membership needs no plan: a restarted worker finds itself in a new group, and the same members meet in the one they
  have.
- Every wait has a deadline; a group in which anything failed is not used again, on either side.
- No global process group is touched: the learner's own ranks keep theirs.

The store and gloo listen on the learner's address alone. Neither knows passwords: names are under a random prefix that
only the handle tells, which keeps strangers out by accident, not by intent. nccl is written after its documentation and
has never run on a GPU.
"""

from __future__ import annotations

import json
import socket
import threading
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from slipstream.rollout.weight_handle import Arrays, WeightError

ALIGNMENT_BYTES = 64
CONNECT_TIMEOUT_S = 30.0


class _Member:
    """This process as a member: its name, its connection to one learner's store, and the group it is in. The calls of
    an actor come from any of its threads, one at a time here."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.name, self.groups = uuid.uuid4().hex, dict[str, Any]()
        self.store: Any = None
        self._learner: tuple[str, int, str] | None = None

    def connect(self, payload: BroadcastPayload, timeout_s: float) -> Any:
        """The learner's store; WeightError if it does not answer."""
        learner = payload.host, payload.port, payload.token
        if self._learner != learner:
            wait = timedelta(seconds=min(timeout_s, CONNECT_TIMEOUT_S))
            try:
                store = dist.TCPStore(payload.host, payload.port, is_master=False, timeout=wait)
            except RuntimeError as error:
                where = f"{payload.host}:{payload.port}"
                raise WeightError(f"weights by broadcast: {where}: {_first_line(error)}") from error
            self._learner, self.store, self.groups = learner, dist.PrefixStore(payload.token, store), {}
        return self.store


_MEMBER = _Member()


@dataclass(frozen=True)
class BroadcastPayload:
    """host, port: of the learner's store; token: prefix of all names; name: of the frame; backend: gloo or nccl; sizes:
    bytes of every array by key, in the order in which they lie in the buffer."""

    host: str
    port: int
    token: str
    name: str
    backend: str
    sizes: tuple[tuple[str, int], ...]
    same_pages: ClassVar[bool] = False
    adoptable: ClassVar[bool] = True

    def receive(self, timeout_s: float) -> Arrays:
        """Joins a group and takes part in one broadcast, into new memory."""
        with _MEMBER.lock:
            store = _MEMBER.connect(self, timeout_s)
            try:
                return self._take_part(store, timeout_s)
            except RuntimeError as error:  # torch's errors of stores and groups are among them
                _MEMBER.groups.clear()
                if isinstance(error, WeightError):
                    raise
                raise WeightError(f"weights by broadcast: {self.name!r}: {_first_line(error)}") from error

    def _take_part(self, store: Any, timeout_s: float) -> Arrays:
        ticket = int(store.add("tickets", 1)) - 1
        store.set(f"ticket/{ticket}", json.dumps([self.name, _MEMBER.name]))
        store.wait([f"answer/{ticket}"], timedelta(seconds=timeout_s))
        group_name, rank, size = json.loads(store.get(f"answer/{ticket}"))
        if not group_name:
            raise WeightError(f"weights by broadcast: the learner does not have {self.name!r} any more")
        group = join_group(store, group_name, rank, size, self, timeout_s, _MEMBER.groups)
        buffer = torch.empty(buffer_bytes(self.sizes), dtype=torch.uint8, device=device_of(self.backend))
        broadcast(group, buffer, timeout_s)
        return split_buffer(buffer, self.sizes)


def join_group(
    store: Any, name: str, rank: int, size: int, payload: BroadcastPayload, timeout_s: float, groups: dict[str, Any]
) -> Any:
    """The group of that name: the one that is in `groups`, or a new one, once all members have come."""
    if name not in groups:
        own = own_address(payload.host, payload.port)
        prefixed, wait = dist.PrefixStore(f"group/{name}", store), timedelta(seconds=timeout_s)
        groups.clear()  # members have changed: the group before will not meet again
        groups[name] = new_group(payload.backend, prefixed, rank, size, own, wait)
    return groups[name]


def new_group(backend: str, store: Any, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    """A process group that torch's global state knows nothing of. address: what gloo listens on."""
    # Any: torch's types leave out most of its process groups.
    distributed: Any = dist
    if backend == "nccl":
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return distributed.ProcessGroupNCCL(store, rank, size, options)
    options = distributed.ProcessGroupGloo._Options()
    options._devices = [distributed.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return distributed.ProcessGroupGloo(store, rank, size, options)


def broadcast(group: Any, buffer: torch.Tensor, timeout_s: float) -> None:
    """Rank 0's buffer into everybody's. RuntimeError where that fails or takes too long."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    options.timeout = timedelta(seconds=timeout_s)
    if len(buffer):
        group.broadcast([buffer], options).wait()
    if buffer.device.type == "cuda":
        torch.cuda.synchronize(buffer.device)


def device_of(backend: str) -> str:
    """Where buffers lie."""
    return "cuda" if backend == "nccl" else "cpu"


def own_address(host: str, port: int) -> str:
    """The address by which this machine reaches the learner."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def buffer_bytes(sizes: tuple[tuple[str, int], ...]) -> int:
    """Bytes of the buffer, in which every array begins at a multiple of ALIGNMENT_BYTES."""
    return sum(_padded(size) for _, size in sizes)


def split_buffer(buffer: torch.Tensor, sizes: tuple[tuple[str, int], ...]) -> dict[str, torch.Tensor]:
    """The arrays in the buffer."""
    out, at = {}, 0
    for key, size in sizes:
        out[key], at = buffer[at : at + size], at + _padded(size)
    return out


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]

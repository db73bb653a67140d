"""The learner's end of a broadcast: keeps what it may be asked for, forms groups of those who ask, and sends.

Invariants
- What is sent is a copy made at publication: the learner may update its weights at any time.
- One thread answers until `close`, or the process's end; whatever fails in a group ends that group, is logged, and is a
  WeightError to its members; the thread goes on.
- A group is formed as soon as all expected workers have asked for the same frame, or when nobody has come for GATHER_S.
"""

from __future__ import annotations

import atexit
import json
import logging
import socket
import threading
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from slipstream.rollout.weight_broadcast import (
    BroadcastPayload,
    broadcast,
    buffer_bytes,
    device_of,
    join_group,
    split_buffer,
)
from slipstream.rollout.weight_handle import Layout, Payload, as_bytes

LOG = logging.getLogger(__name__)
GATHER_S = 0.25
IDLE_WAIT_S = 0.2
SERVER_TIMEOUT_S = 30.0
"""Of one group: a member that died must not keep the others waiting for the whole of their own deadline."""


class BroadcastSender:
    """backend: gloo or nccl; host: the address to listen on; num_receivers: workers that are expected to ask."""

    verifies = False

    def __init__(self, backend: str, host: str, num_receivers: int) -> None:
        self._backend, self._host, self._num_receivers = backend, host, num_receivers
        self._token = uuid.uuid4().hex
        # Bound here: torch itself would listen on every address of the machine.
        self._socket = socket.create_server((host, 0))
        self._port = int(self._socket.getsockname()[1])
        store = dist.TCPStore(
            host,
            self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=SERVER_TIMEOUT_S),
            master_listen_fd=self._socket.detach(),
        )
        self._store = dist.PrefixStore(self._token, store)
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[BroadcastPayload, torch.Tensor]] = {}
        self._groups: dict[str, Any] = {}
        self._next_ticket = 0
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="weight broadcast", daemon=True)
        self._thread.start()
        # A thread that the interpreter's end finds inside of torch's store would abort the process.
        atexit.register(self.close)

    def room(self, layout: Layout) -> Mapping[str, torch.Tensor]:
        """They are copied all the same."""
        return {}

    def begin_settle(self) -> None:
        """Nothing to do: whoever asks is sent a copy."""

    def settle(self) -> Mapping[str, torch.Tensor]:
        """As `begin_settle`."""
        return {}

    def send(self, name: str, layout: Layout, tensors: Mapping[str, torch.Tensor]) -> Payload:
        """Copies the tensors; whoever asks is sent the copy."""
        sizes = tuple((key, tensor.nbytes) for key, tensor in tensors.items())
        buffer = torch.empty(buffer_bytes(sizes), dtype=torch.uint8, device=device_of(self._backend))
        for key, part in split_buffer(buffer, sizes).items():
            part.copy_(as_bytes(tensors[key]))
        payload = BroadcastPayload(self._host, self._port, self._token, name, self._backend, sizes)
        with self._lock:
            self._kept[name] = payload, buffer
        return payload

    def keep(self, payloads: list[Payload]) -> None:
        """The copies of the others are dropped."""
        names = {getattr(payload, "name", "") for payload in payloads}
        with self._lock:
            self._kept = {name: kept for name, kept in self._kept.items() if name in names}

    def close(self) -> None:
        """Ends the thread; nobody is answered any more."""
        self._closed = True
        self._thread.join(SERVER_TIMEOUT_S)
        atexit.unregister(self.close)

    # ---- the thread

    def _serve(self) -> None:
        waiting: dict[int, tuple[str, str]] = {}
        while not self._closed:
            arrived = self._take_ticket(GATHER_S if waiting else IDLE_WAIT_S)
            if arrived is not None:
                waiting[arrived[0]] = arrived[1], arrived[2]
            for name in {name for name, _ in waiting.values()}:
                asked = {ticket: member for ticket, (wanted, member) in waiting.items() if wanted == name}
                if arrived is None or len(asked) >= self._num_receivers:
                    waiting = {ticket: entry for ticket, entry in waiting.items() if ticket not in asked}
                    self._send_to(name, asked)

    def _take_ticket(self, wait_s: float) -> tuple[int, str, str] | None:
        """The next ticket's number, frame and member, if it comes in time."""
        ticket = self._next_ticket
        try:
            self._store.wait([f"ticket/{ticket}"], timedelta(seconds=wait_s))
            name, member = json.loads(self._store.get(f"ticket/{ticket}"))
        except RuntimeError:  # nobody came: DistStoreError is one
            return None
        self._next_ticket += 1
        return ticket, str(name), str(member)

    def _send_to(self, name: str, asked: Mapping[int, str]) -> None:
        with self._lock:
            kept = self._kept.get(name)
        try:
            members = sorted(asked.values())
            size = len(members) + 1
            known = [group for group in self._groups if group.split("/")[1:] == members]
            group_name = "" if kept is None else known[0] if known else "/".join([uuid.uuid4().hex, *members])
            for ticket, member in asked.items():
                answer = json.dumps([group_name, members.index(member) + 1, size])
                self._store.set(f"answer/{ticket}", answer)
            if kept is not None:
                payload, buffer = kept
                deadline = SERVER_TIMEOUT_S
                group = join_group(self._store, group_name, 0, size, payload, deadline, self._groups)
                broadcast(group, buffer, deadline)
        except RuntimeError as error:
            self._groups.clear()
            LOG.warning("weights %s: a broadcast to %d workers failed: %s", name, len(asked), error)

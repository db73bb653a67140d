"""Weights shared out over several learners: the process group, FSDP2, and whole tensors when they are needed.

Invariants
- Gradients are summed over the learners, never averaged: a loss is already divided by the whole update's tokens.
- Every function that talks to the other learners is called by all of them, in the same order.
- The rendezvous, and on Linux the connections of gloo, bind to the node's Ray address alone (loopback in a local Ray).
- Every wait for another learner has a deadline.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of a network interface (netdevice(7))."""


def listen(host: str) -> socket.socket:
    """A free port on `host` for the rendezvous."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.bind((host, 0))
    listener.listen()
    return listener


def join_group(
    rank: int,
    num_ranks: int,
    address: tuple[str, int],
    listener: socket.socket | None,
    device: str,
    start_timeout_s: float,
    call_timeout_s: float,
) -> DeviceMesh:
    """Waits until all ranks are there; the mesh of all of them. listener: on rank 0, the socket behind `address`."""
    host, port = address
    _listen_only_on(host)
    if listener is None:
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=start_timeout_s))
    else:
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=start_timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    return _mesh(store, rank, num_ranks, device, call_timeout_s)


def group_of_one(device: str, call_timeout_s: float) -> DeviceMesh:
    """A mesh of this process alone. gloo listens even then: on loopback, where nobody else has business."""
    _listen_only_on("127.0.0.1")
    return _mesh(dist.HashStore(), 0, 1, device, call_timeout_s)


def _mesh(store: dist.Store, rank: int, num_ranks: int, device: str, timeout_s: float) -> DeviceMesh:
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "nccl" if device == "cuda" else "gloo"
    if dist.is_initialized():
        dist.destroy_process_group()
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    return init_device_mesh(device, (num_ranks,))


def _listen_only_on(host: str) -> None:
    """Without it gloo and nccl take whatever the host name resolves to, which may be an address open to everybody."""
    interface = _interface(host)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface


def _interface(host: str) -> str | None:
    """The network interface that has the IPv4 address `host`; None where that cannot be found out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    return None


def shard(
    model: torch.nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype, master_dtype: torch.dtype | None = None
) -> None:
    """Shares the weights out, block by block; each pass gathers a block just before it is needed.

    The masters are `master_dtype`, by default the model's own; matrices are multiplied in `compute_dtype`, gradients
    summed in float32. Of a model that is mapped from a file never more than this learner's part and one block are
    copied into memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in (*blocks, model):
        _convert(block, master_dtype)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for module in _sharded_modules(model):
        # FSDP divides by the number of ranks unless it is told 1; gloo knows no scaled sum, hence the second line.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _convert(module: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Floating-point tensors that are not shared out yet, ties kept; None: as they are."""
    if dtype is None:
        return
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() and not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(dtype)


def _sharded_modules(model: torch.nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def share_out_again(model: torch.nn.Module) -> None:
    """To be called after passes without a backward pass.

    FSDP leaves the outermost weights gathered after a forward pass, in the belief that the backward pass is next;
    until then `parameters()` are those copies, and an optimiser would change them instead of the weights.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the whole of a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This learner's part of `tensor`, which all have, cut as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    placed = tensor.to(like.device_mesh.device_type)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def weight_shapes(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `whole_weights` gives, as tensors without memory."""
    return {
        name: torch.empty(tensor.shape, dtype=_kept_dtype(tensor, dtype), device="meta")
        for name, tensor in _named_once(model).items()
    }


def whole_weights(
    model: torch.nn.Module, dtype: torch.dtype, keep: bool, into: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The model's tensors by name on the CPU, parameters as `dtype`, one name per tied group; {} unless `keep`.

    into: CPU tensors by name that are to hold them.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in _named_once(model).items():
        full = whole(tensor.detach())
        if keep:
            place = None if into is None else into.get(name)
            wanted = _kept_dtype(tensor, dtype)
            out[name] = full.to("cpu", wanted, copy=True) if place is None else place.copy_(full)
    return out


def _named_once(model: torch.nn.Module) -> dict[str, Tensor]:
    named: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor))
    return dict(named.values())


def _kept_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if isinstance(tensor, torch.nn.Parameter) else tensor.dtype


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors, sharded ones on the CPU; {} unless `keep`. One after the other: never two of them on a GPU."""
    out = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            out[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return out


def all_sum(values: Tensor, device: str) -> Tensor:
    """The sum of all learners' CPU tensors of the same shape, on the CPU."""
    moved = values.to(device)
    dist.all_reduce(moved)
    return moved.cpu()


def sum_over_ranks(metrics: Mapping[str, float], device: str) -> dict[str, float]:
    """The sums of all learners' metrics, which have the same names."""
    names = sorted(metrics)
    values = all_sum(torch.tensor([metrics[name] for name in names], dtype=torch.float64), device)
    return dict(zip(names, values.tolist(), strict=True))

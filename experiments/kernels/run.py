"""How far is every kernel from its plain twin, and how near to the memory bandwidth of the device at hand?

Errors are against the float32 or numpy twin in kernels/. The floor of a time is the bytes that must be read and
written once, over the bytes per second of a large copy on the same device. Triton kernels are timed on a GPU only:
through its interpreter, on a CPU, their errors are given and nothing else.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from slipstream.experiments.kernels.native import native_kernels
from slipstream.experiments.kernels.timing import ceiling
from slipstream.experiments.kernels.triton_errors import triton_errors
from slipstream.experiments.kernels.triton_speed import Sizes, triton_speed
from slipstream.kernels.dispatch import NATIVE_ERROR, pick_backend
from slipstream.kernels.native_set import best_products

NO_GPU = "not measured: no GPU"
NO_INTERPRETER = "not run: on a CPU this needs TRITON_INTERPRET=1 in the environment"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if any")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure (default 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Errors and speeds by kernel, and the issue's bars."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = torch.device(name)
    result: dict[str, Any] = {"device": name, "rounds": args.rounds}
    result |= cpu_figures(args.rounds) if name == "cpu" else {}
    result |= triton_figures(device, args.rounds, Sizes())
    return result


def cpu_figures(rounds: int) -> dict[str, Any]:
    """The native kernels, if they are built."""
    if NATIVE_ERROR:
        return {"native": f"not run: {NATIVE_ERROR}"}
    copied = ceiling(torch.device("cpu"), rounds)
    amx = {"amx": best_products() == "tiles"}
    return amx | {"cpu_copy_gb_per_s": copied / 1e9, "native": with_shares(native_kernels(rounds), copied)}


def triton_figures(device: torch.device, rounds: int, sizes: Sizes) -> dict[str, Any]:
    """The Triton kernels: errors anywhere, speeds and bars on a GPU."""
    nothing = {"triton_speed": NO_GPU, "bars": dict.fromkeys(bars({}), NO_GPU)}
    try:
        pick_backend("triton", device)
    except ValueError:
        return {"triton_error": NO_INTERPRETER} | nothing
    errors = {"triton_error": triton_errors(device)}
    if device.type != "cuda":
        return errors | nothing
    copied = ceiling(device, rounds)
    speed = with_shares(triton_speed(device, rounds, sizes), copied)
    return errors | {"gpu_copy_gb_per_s": copied / 1e9, "triton_speed": speed, "bars": bars(speed)}


def with_shares(figures: dict[str, dict[str, Any]], bytes_per_s: float) -> dict[str, dict[str, Any]]:
    """Adds floor_share: the least time that moving the bytes takes, over the time taken."""
    return {
        name: one | {"floor_share": one["bytes"] / bytes_per_s / (one["us"] * 1e-6)} for name, one in figures.items()
    }


def bars(speed: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The figures that issue 4 sets a bar for: sample_verify at least 0.8 of its floor, 8 query tokens at most 1.3
    times the time of one. None where a figure is missing."""
    wanted: dict[str, float | None] = {}
    for dtype in ("bfloat16", "float32"):
        rows = [one["floor_share"] for key, one in speed.items() if key.startswith(f"sample_verify_{dtype}_")]
        wanted[f"sample_verify_floor_share_{dtype}"] = max(rows, default=None)
    for model in ("0.5b", "8b"):
        one, eight = (speed.get(f"verify_attention_{model}_{width}_tokens") for width in (1, 8))
        wanted[f"verify_attention_8_over_1_{model}"] = eight["us"] / one["us"] if one and eight else None
    return wanted

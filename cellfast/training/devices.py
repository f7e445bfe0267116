"""Where a computation runs: the device asked for, and a warning where bfloat16 would be emulated."""

from __future__ import annotations

import os

import torch

from cellfast.errors import CellfastError, option
from cellfast.system import bfloat16_is_native


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA where there is a GPU, else the CPU; ``cuda`` without one raises `CellfastError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise CellfastError(
            "device cuda was asked for, but torch finds no GPU (`cellfast info --system` says more); use "
            f"{option('device', 'cpu')}"
        )
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def amp_warning(device: torch.device) -> str | None:
    """What to say about ``amp`` on a CPU that has no bfloat16 arithmetic, else None."""
    if device.type == "cpu" and not bfloat16_is_native():
        return (
            f"warning: {option('amp', True)} runs in bfloat16 as asked, but this CPU has no bfloat16 instructions and emulates "
            "them, which is slower than float32; leave it out here"
        )
    return None

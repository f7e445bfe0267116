"""The operator behind the views: ``torch.ops.cellfast.augment_views``; imports torch only. The contract is in
csrc/augment/augment.h."""

from __future__ import annotations

from typing import Any

import torch

from cellfast.ops.extension import backends, require_cpu_backend

require_cpu_backend()

PADDINGS = {"reflection": 0, "border": 1, "zeros": 2}


def _is_current() -> bool:
    if not hasattr(torch.ops.cellfast, "augment_views"):
        return False
    return "inverted" in {argument.name for argument in torch.ops.cellfast.augment_views.default._schema.arguments}


if not _is_current():
    raise ImportError(
        "cellfast's compiled operators are older than this source (augment_views): build them again with 'make build' or "
        "'python setup.py build_ext --inplace'"
    )


@torch.library.register_fake("cellfast::augment_views")
def _augment_views_fake(*args: Any, **kwargs: Any) -> None:
    return None


def _has_cuda_kernel() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("cellfast::augment_views", "CUDA")


def missing_on(device: torch.device) -> str | None:
    """Why ``augment_views`` cannot run on ``device``, or None where it can."""
    if device.type == "cpu" or (device.type == "cuda" and _has_cuda_kernel()):
        return None
    if device.type != "cuda":
        return f"there is no operator for {device.type}"
    cuda = backends()["_C_cuda"]
    return cuda.reason or "_C_cuda is older than this source; build it again with 'make build'"

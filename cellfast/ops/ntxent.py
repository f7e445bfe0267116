"""The public NT-Xent operator: shapes for the compiler (fakes), gradients, and ``ntxent_loss``. The contract is in
csrc/ntxent/ntxent.h."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Union

import torch

from cellfast.ops.extension import backends, require_cpu_backend

require_cpu_backend()

NO_DOUBLE_BACKWARD = (
    "cellfast.ops.ntxent_loss has first-order gradients only; for a gradient of its gradient use "
    "cellfast.ops.ntxent_loss_reference"
)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stored(z: torch.Tensor) -> torch.dtype:
    # On a GPU half-precision rows stay in half precision (the matrix units' input); on a CPU they are kept in float32.
    return z.dtype if z.device.type == "cuda" else _accumulator(z.dtype)


@torch.library.register_fake("cellfast::ntxent_normalize")
def _normalize_fake(z: torch.Tensor, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return z.new_empty(z.shape, dtype=_stored(z)), z.new_empty(z.shape[0], dtype=_accumulator(z.dtype))


@torch.library.register_fake("cellfast::ntxent_forward")
def _forward_fake(
    z: torch.Tensor, temperature: torch.Tensor, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        z.new_empty((), dtype=_accumulator(z.dtype)),
        z.new_empty(z.shape, dtype=_stored(z)),
        z.new_empty(z.shape[0], dtype=_accumulator(z.dtype)),
        z.new_empty(z.shape[0], dtype=torch.float64),
    )


@torch.library.register_fake("cellfast::ntxent_backward")
def _backward_fake(
    grad_loss: torch.Tensor,
    zhat: torch.Tensor,
    inv_norm: torch.Tensor,
    lse: torch.Tensor,
    temperature: torch.Tensor,
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return zhat.new_empty(zhat.shape, dtype=dtype), zhat.new_empty((), dtype=torch.float64)


@torch.library.register_fake("cellfast::ntxent_shard_forward")
def _shard_forward_fake(
    zhat: torch.Tensor, temperature: torch.Tensor, shard: int, num_shards: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_local = zhat.shape[0] // num_shards
    return zhat.new_empty(num_local, dtype=torch.float64), zhat.new_empty(num_local, dtype=torch.float64)


@torch.library.register_fake("cellfast::ntxent_shard_backward")
def _shard_backward_fake(
    grad_loss: torch.Tensor,
    zhat: torch.Tensor,
    inv_norm: torch.Tensor,
    lse: torch.Tensor,
    temperature: torch.Tensor,
    normalize: bool,
    shard: int,
    num_shards: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return zhat.new_empty((zhat.shape[0] // num_shards, zhat.shape[1]), dtype=dtype), zhat.new_empty((), dtype=torch.float64)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    z, temperature, ctx.normalize = inputs
    _, zhat, inv_norm, lse = output
    ctx.dtype = z.dtype
    ctx.save_for_backward(zhat, inv_norm, lse, temperature)
    # zhat stays differentiable, so that a gradient taken with create_graph depends on z and its own gradient is refused, not
    # dropped.
    ctx.mark_non_differentiable(inv_norm, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
    if grad_loss is None:
        return None, None, None
    zhat, inv_norm, lse, temperature = ctx.saved_tensors
    grad_z, grad_temperature = torch.ops.cellfast.ntxent_backward(
        grad_loss, zhat, inv_norm, lse, temperature, ctx.normalize, ctx.dtype
    )
    return grad_z, grad_temperature, None


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(NO_DOUBLE_BACKWARD)


torch.library.register_autograd("cellfast::ntxent_forward", _backward, setup_context=_save_for_backward)
for _operator in ("ntxent_backward", "ntxent_shard_backward"):
    torch.library.register_autograd(f"cellfast::{_operator}", _refuse)


def _register_missing_cuda(reason: str) -> None:
    # Without this the dispatcher would answer a CUDA tensor with a page about dispatch keys.
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"z is on a CUDA device, but cellfast's CUDA operators are not available: {reason}. Rebuild with CELLFAST_CUDA=1 on "
            "a machine with the CUDA toolkit, or move z to the CPU."
        )

    for name in ("ntxent_normalize", "ntxent_forward", "ntxent_backward", "ntxent_shard_forward", "ntxent_shard_backward"):
        torch.library.impl(f"cellfast::{name}", "CUDA", refuse)

    def refuse_choice(name: str) -> str:
        raise RuntimeError(f"cellfast's CUDA operators are not available, so there are no kernels to choose from: {reason}.")

    torch.library.impl("cellfast::ntxent_cuda_kernel", "CompositeExplicitAutograd", refuse_choice)


if not backends()["_C_cuda"].loaded:
    _register_missing_cuda(backends()["_C_cuda"].reason)


def _keyword_only(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make ``normalize`` keyword-only for Python callers; TorchScript, which has no such thing, compiles ``function`` itself."""

    @functools.wraps(function)
    def ntxent_loss(z: torch.Tensor, temperature: float | torch.Tensor = 0.1, *, normalize: bool = True) -> torch.Tensor:
        return function(z, temperature, normalize)

    del ntxent_loss.__wrapped__  # help() and inspect shall show the keyword-only signature
    ntxent_loss.__script_if_tracing_wrapper = True  # type: ignore[attr-defined]
    ntxent_loss.__original_fn = function  # type: ignore[attr-defined]
    return ntxent_loss


@_keyword_only
def ntxent_loss(z: torch.Tensor, temperature: Union[float, torch.Tensor] = 0.1, normalize: bool = True) -> torch.Tensor:  # noqa: UP007
    """NT-Xent (SimCLR) loss of projections, exact, in O(M·D) memory: the M × M similarities are never stored.

    Equals ``ntxent_loss_reference``: rows normalised, ``s = ẑ ẑᵀ / temperature``, the diagonal masked, and the mean over the M =
    2N rows of the cross entropy against row (i + N) mod 2N.

    Args:
        z: projections [2N, D], rows 0:N the first views, N:2N the second views of the same cells; float64, float32, bfloat16 or
            float16; any strides. Accumulation is float32 at least. A row shorter than 1e-12 counts as having no direction: its
            gradient is 0.
        temperature: a positive number, or a tensor of one element, through which the loss is then differentiable.
        normalize: False takes the rows as they are (similarities are then not bounded by 1).

    Returns:
        The loss, a scalar: float64 for float64 input, else float32. NaN or infinity in ``z`` gives NaN. N = 1 gives 0.

    Raises:
        ValueError: ``z`` is not [2N, D] with N ≥ 1 and D ≥ 1, not floating point, or ``temperature`` is not positive.
        RuntimeError: a second derivative is asked for; ``z`` is on a device this build has no operator for.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations (2020), equation 1.
    """
    if z.dim() != 2 or z.size(0) % 2 != 0 or z.size(0) == 0 or z.size(1) == 0:
        raise ValueError(f"z must have shape [2N, D] with an even row count, got {list(z.shape)}")
    if z.dtype != torch.float32 and z.dtype != torch.bfloat16 and z.dtype != torch.float16 and z.dtype != torch.float64:
        raise ValueError(f"z must be float64, float32, bfloat16 or float16, got {z.dtype}")
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature must be one number, got shape {list(temperature.shape)}")
        tau = temperature.reshape([]).to(device=z.device, dtype=torch.float64)
    else:
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a positive finite number, got {temperature}")
        tau = torch.full([], temperature, dtype=torch.float64, device=z.device)
    return torch.ops.cellfast.ntxent_forward(z, tau, normalize)[0]


def ntxent_cuda_kernel(name: str | None = None) -> str:
    """Choose the CUDA kernels of ``ntxent_loss`` for this process, or (without ``name``) say which are chosen.

    Args:
        name: "portable" (any GPU, dtype and D); "sm90a" (compute capability 9.0, bfloat16 or float16, D ≤ 512; any other input is
            then refused); "auto" (the default: "sm90a" on GPUs where its tests have passed and its speed was measured, else
            "portable").

    Returns:
        The name that is chosen from now on. It is "auto", or ``$CELLFAST_NTXENT_CUDA``, until this function is called.

    Raises:
        RuntimeError: ``name`` or ``$CELLFAST_NTXENT_CUDA`` is none of the three; this build has no CUDA operators.
    """
    return torch.ops.cellfast.ntxent_cuda_kernel(name or "")

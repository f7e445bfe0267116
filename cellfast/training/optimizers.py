"""Optimisers: Adam, AdamW and LARS, with weight decay kept off biases and BatchNorm where that is the custom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor by η ‖w‖ / ‖g + λ w‖.

    Equivalent, per tensor with ``adapt``, to ``d = g + λ w; d *= η ‖w‖ / ‖d‖ (where both norms are positive); m = μ m + d; w
    -= lr · m``.
    Groups with ``adapt: False`` (biases, BatchNorm) are plain SGD with momentum.

    Args:
        params: parameters or groups; a group may carry ``weight_decay`` and ``adapt``.
        lr: learning rate.
        momentum: μ.
        weight_decay: λ.
        trust_coefficient: η.

    Source: You et al. 2017 (arXiv 1708.03888) as used by SimCLR: the learning rate multiplies the momentum, not what enters it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        for name, value in (
            ("lr", lr),
            ("momentum", momentum),
            ("weight_decay", weight_decay),
            ("trust_coefficient", trust_coefficient),
        ):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            moments = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in weights]
            updates = torch._foreach_add([p.grad for p in weights], weights, alpha=group["weight_decay"])
            if group["adapt"]:
                # Norms stay on the device: asking for their values would make the host wait.
                scales = [
                    torch.where((w > 0) & (d > 0), group["trust_coefficient"] * w / d.clamp_min(torch.finfo(d.dtype).tiny), 1.0)
                    for w, d in zip(torch._foreach_norm(weights), torch._foreach_norm(updates))
                ]
                torch._foreach_mul_(updates, scales)
            torch._foreach_mul_(moments, group["momentum"])
            torch._foreach_add_(moments, updates)
            torch._foreach_add_(weights, moments, alpha=-group["lr"])
        return loss


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """``adamw``, ``adam`` or ``lars`` over a model's parameters.

    ``adam`` puts L2 weight decay on everything, as ``torch.optim.Adam(model.parameters(), lr, weight_decay=…)`` does in the
    reference
    implementation. The others leave out biases and BatchNorm (tensors of one dimension); LARS does not adapt those either.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    wide = [p for p in parameters if p.ndim > 1]
    narrow = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": wide, "weight_decay": weight_decay}, {"params": narrow, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=lr, momentum=momentum)
    raise ValueError(f"optimizer must be adamw, adam or lars, got {name!r}")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr

"""Everything a run needs to go on as if it had not stopped: ``RUN/checkpoints/last.pt``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from cellfast import __version__
from cellfast.atomic import atomic_path
from cellfast.errors import CellfastError
from cellfast.model_file import load_weights_only
from cellfast.models import SimCLR

FORMAT = "cellfast-checkpoint"
FORMAT_VERSION = 1


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    step: int,
    model: SimCLR,
    optimizer: torch.optim.Optimizer,
    loader_state: dict[str, Any],
    config: dict[str, Any],
    training_data: str,
) -> None:
    """Write the state after ``step`` optimiser steps, atomically. Views depend on seed and step only, so no generator needs
    saving."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "cellfast_version": __version__,
        "step": step,
        "model_config": model.config.to_dict(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "loader": loader_state,
        "config": config,
        "training_data": training_data,
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint on the CPU, read without executing anything; `CellfastError` when it is not one or is
    damaged."""
    path = Path(path)
    if not path.exists():
        raise CellfastError(f"there is no checkpoint {path} to resume from: start the run anew with --force")
    content = load_weights_only(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CellfastError(f"{path} is not a cellfast checkpoint")
    if content.get("format_version", 0) > FORMAT_VERSION:
        raise CellfastError(
            f"{path} was written by cellfast {content.get('cellfast_version')}, whose checkpoints this version "
            f"({__version__}) does not read"
        )
    return content


def restore(
    content: dict[str, Any],
    model: SimCLR,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    path: str | os.PathLike[str],
) -> int:
    """Put a checkpoint's weights and optimiser state in place and return its step; another model or optimiser is a `CellfastError`."""
    ours, theirs = model.config.to_dict(), content.get("model_config")
    changed = [] if theirs is None else [f"{k} was {theirs.get(k)}, is {v}" for k, v in ours.items() if theirs.get(k) != v]
    was = content.get("config", {}).get("optimizer", config["optimizer"])
    if was != config["optimizer"]:
        changed.append(f"optimizer was {was}, is {config['optimizer']}")
    if changed:
        raise CellfastError(
            f"the checkpoint {path} does not fit this run: {'; '.join(changed)}. Leave those options as they were"
        )
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        return int(content["step"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CellfastError(f"the checkpoint {path} does not fit this run: {error}") from error

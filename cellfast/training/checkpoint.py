"""Everything a run needs to go on as if it had not stopped: ``RUN/checkpoints/last.pt``, and the one before it,
``previous.pt``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from cellfast import __version__
from cellfast.atomic import atomic_path, partial_path
from cellfast.errors import CellfastError, option
from cellfast.models import SimCLR
from cellfast.tensor_file import load_tensors, write_tensors

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
    """Write the state after ``step`` optimiser steps, atomically; what ``path`` held becomes ``previous.pt`` beside it. Views
    depend on seed and step only, so no generator needs saving."""
    path = Path(path)
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
        write_tensors(temporary, content)
        if path.exists():
            _keep(path)


def _keep(path: Path) -> None:
    link = partial_path(path)
    try:
        os.link(path, link)
    except OSError:
        # This file system has no hard links. A kill before the next rename leaves no last.pt, and `find_checkpoint` takes
        # previous.pt.
        os.replace(path, previous_of(path))
        return
    os.replace(link, previous_of(path))
    # Where a killed run left both names to one file, renaming one to the other does nothing.
    link.unlink(missing_ok=True)


def previous_of(path: Path) -> Path:
    """Where the checkpoint before ``path`` lies."""
    return path.with_name("previous.pt")


def find_checkpoint(path: Path) -> tuple[Path | None, str]:
    """The newest whole checkpoint of a run, ``path`` or the one before it, and what to say about the choice; None where there is
    none.

    A damaged ``path`` is kept as ``damaged.pt`` when the one before it is whole, so that the next checkpoint does not replace a
    whole one by it.

    Raises:
        CellfastError: there are checkpoints, and none of them can be read.
    """
    earlier = previous_of(path)
    if not path.exists():
        if not earlier.exists():
            return None, ""
        load_checkpoint(earlier)
        return earlier, f"{path} is missing, as after a stop in the middle of writing it: going on from {earlier}"
    try:
        load_checkpoint(path)
        return path, ""
    except CellfastError as error:
        try:
            load_checkpoint(earlier)
        except CellfastError as other:
            also = (
                f"; the one before it cannot be used either: {other}" if earlier.exists() else f", and there is no {earlier.name}"
            )
            raise CellfastError(
                f"{error}{also}. Copy the checkpoint back from where it was whole, or start anew with {option('force', True)}"
            ) from error
        kept = path.with_name("damaged.pt")
        os.replace(path, kept)
        return earlier, f"{error}. Kept as {kept}; going on from the checkpoint before it, {earlier}"


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint on the CPU, read without executing anything; `CellfastError` when it is not one or is
    damaged."""
    path = Path(path)
    if not path.exists():
        raise CellfastError(f"there is no checkpoint {path}")
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CellfastError(f"{path} is not a cellfast checkpoint")
    missing = sorted({"format_version", "step", "model", "optimizer", "loader", "training_data"} - set(content))
    if missing:
        raise CellfastError(f"the checkpoint {path} is damaged: it has no {', '.join(missing)}")
    if content["format_version"] > FORMAT_VERSION:
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
    """Put a checkpoint's weights and optimiser state in place and return its step; another model or optimiser is a
    `CellfastError`."""
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

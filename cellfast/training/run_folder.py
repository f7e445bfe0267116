"""The folder of a training run: what lies where, when it may be written to, and the metrics it keeps."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellfast.errors import CellfastError


@dataclass(frozen=True)
class RunFolder:
    """``RUN/``: config.yaml, model.pt, metrics.jsonl, checkpoints/last.pt, tensorboard/."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        return self.path / "model.pt"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.pt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def prepare(self, *, resume: bool, force: bool) -> None:
        """Make the folder ready for a new run or for ``resume``.

        ``force`` removes an earlier run's files, and nothing else that may lie there.

        Raises:
            CellfastError: the folder holds a run and neither ``resume`` nor ``force`` is given; it holds none and ``resume`` is; both are.
        """
        if resume and force:
            raise CellfastError("--resume continues the run and --force discards it: give one of them")
        ours = [self.config, self.model, self.checkpoint, self.metrics]
        if resume:
            if not self.config.exists():
                raise CellfastError(f"{self.path} holds no run to resume (no config.yaml): leave out --resume to start one")
            return
        found = [p.relative_to(self.path).as_posix() for p in ours if p.exists()]
        if found and not force:
            raise CellfastError(
                f"{self.path} already holds a run ({', '.join(found)}): --resume continues it, --force discards it"
            )
        if self.path.exists() and not self.path.is_dir():
            raise CellfastError(f"{self.path} is a file: expected a folder for the run")
        for path in ours:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def forget_after(self, step: int) -> None:
        """Drop lines of metrics.jsonl after ``step``: a run resumed from an older checkpoint writes them again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short when the run was killed
        self.metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


class MetricsLog:
    """Writes scalars to metrics.jsonl (one JSON object a line) and to TensorBoard; does nothing on other ranks."""

    def __init__(self, folder: RunFolder, *, enabled: bool, step: int) -> None:
        self._file, self._board = None, None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            folder.forget_after(step)
            self._file = open(folder.metrics, "a", encoding="utf-8")
            self._board = SummaryWriter(str(folder.tensorboard), purge_step=step)

    def write(self, step: int, **values: Any) -> None:
        """Write ``values`` (numbers; None is left out) at ``step``."""
        if self._file is None:
            return
        values = {key: value for key, value in values.items() if value is not None}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._file = None

"""The folder of a training run: what lies where, when it may be written to, and the metrics it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import IO, Any

from cellfast.atomic import remove_abandoned, told_when_full, write_text
from cellfast.errors import CellfastError, option
from cellfast.storage.locks import FolderLock
from cellfast.training.checkpoint import find_checkpoint, previous_of


class RunFolder:
    """``RUN/``: config.yaml, model.pt, metrics.jsonl, checkpoints/last.pt and previous.pt, tensorboard/.

    One training at a time writes there, between `take` and `release`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FolderLock(path, "cellfast train")

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

    def _files(self) -> list[Path]:
        checkpoints = [self.checkpoint, previous_of(self.checkpoint), self.checkpoint.with_name("damaged.pt")]
        return [self.config, self.model, self.metrics, *checkpoints]

    def take(self, *, resume: bool, force: bool) -> tuple[Path | None, str]:
        """Keep other trainings out of the folder and return the checkpoint to go on from (None: start anew) and what to say of
        it.

        Raises:
            CellfastError: another training writes there; the folder holds a run and neither ``resume`` nor ``force`` is given, or
                both are; its checkpoints cannot be read.
        """
        if resume and force:
            raise CellfastError(
                f"{option('resume', True)} continues the run and {option('force', True)} discards it: give one of them"
            )
        self._lock.acquire()
        for folder in (self.path, self.checkpoint.parent):
            remove_abandoned(folder)
        if resume:
            checkpoint, note = find_checkpoint(self.checkpoint)
            if checkpoint is None and self.model.exists():
                raise CellfastError(
                    f"{self.path} holds a model but no checkpoint to go on from: {option('force', True)} discards it and starts "
                    "anew, another folder keeps it"
                )
            return checkpoint, note or ("" if checkpoint else f"{self.path} holds no checkpoint yet: starting from the beginning")
        found = [p.relative_to(self.path).as_posix() for p in self._files() if p.exists()]
        if found and not force:
            raise CellfastError(
                f"{self.path} already holds a run ({', '.join(found)}): {option('resume', True)} continues it, "
                f"{option('force', True)} discards it"
            )
        return None, ""

    def clear(self) -> None:
        """Remove an earlier run's files, and nothing else that may lie there."""
        for path in self._files():
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)

    def release(self) -> None:
        """Let other trainings into the folder."""
        self._lock.release()

    def forget_after(self, step: int) -> None:
        """Drop lines of metrics.jsonl after ``step``: a run resumed from an older checkpoint writes them again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short when the run was killed
        write_text(self.metrics, "".join(line + "\n" for line in kept))


class MetricsLog:
    """Writes scalars to metrics.jsonl (one JSON object a line) and to TensorBoard; does nothing on other ranks."""

    def __init__(self, folder: RunFolder, *, enabled: bool, step: int) -> None:
        self._file: IO[str] | None = None
        self._folder = folder
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            folder.forget_after(step)
            self._file = open(folder.metrics, "a", encoding="utf-8")
            self._board: Any = SummaryWriter(str(folder.tensorboard), purge_step=step)

    def write(self, step: int, **values: Any) -> None:
        """Write ``values`` (numbers; None is left out) at ``step``."""
        if self._file is None:
            return
        values = {key: value for key, value in values.items() if value is not None}
        with told_when_full(self._folder.metrics):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with told_when_full(self._folder.metrics):
            try:
                file.close()
            finally:
                self._board.close()

"""Who is compared: cellfast, and beside it the reference's checkout or the plain baseline; each job runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellfast.errors import CellfastError

HERE = Path(__file__).resolve().parent
PACKAGES = "albumentations==1.3.1 numpy==1.26.4 pandas==1.5.3 matplotlib==3.7.5 seaborn==0.11.2 opencv-python-headless==4.10.0.84 scikit-learn==1.3.2 scipy==1.11.4 scikit-image==0.22.0 imutils joblib tqdm pyyaml tensorboard torch torchvision"


@dataclass(frozen=True)
class Side:
    """An implementation and the interpreter that runs it.

    Attributes:
        name: ``cellfast``, ``reference`` or ``baseline``.
        file: its `worker` implementation.
        python: the interpreter.
        values: what every job of this side carries.
        parts: the parts it is measured in; None: all.
    """

    name: str
    file: Path
    python: str = sys.executable
    values: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] | None = None

    def run(self, part: str, *, threads: int, timeout: float | None = None, **job: Any) -> dict[str, Any]:
        """Measure ``part`` in a new process and return what `worker` wrote; see `run_several`."""
        return self.run_several([{"part": part, **job}], threads=threads, timeout=timeout)[0]

    def run_several(self, jobs: Sequence[dict[str, Any]], *, threads: int, timeout: float | None = None) -> list[dict[str, Any]]:
        """Measure ``jobs`` one after the other in one new process: libraries are imported once, memory is less exact.

        Raises:
            CellfastError: the process failed; the end of what it said is in the message.
        """
        parts = ", ".join(job["part"] for job in jobs)
        with tempfile.TemporaryDirectory(prefix="cellfast-bench-") as temporary:
            folder = Path(temporary)
            common = {"threads": threads, "folder": temporary, **self.values, "implementation": str(self.file)}
            work = {"result": str(folder / "result.json"), "jobs": [{**common, **job} for job in jobs]}
            (folder / "job.json").write_text(json.dumps(work), encoding="utf-8")
            environment = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}}
            if self.name == "reference":
                environment.pop("PYTHONPATH", None)
            else:
                # A source checkout need not be installed.
                paths = [str(HERE.parents[2]), environment.get("PYTHONPATH", "")]
                environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
            command = [self.python, str(HERE / "worker.py"), str(folder / "job.json")]
            try:
                done = subprocess.run(command, env=environment, cwd=temporary, capture_output=True, text=True, timeout=timeout)
            except OSError as error:
                raise CellfastError(f"--reference-python {self.python}: cannot be run ({error})") from error
            except subprocess.TimeoutExpired:
                return [{"timed_out": timeout} for _ in jobs]
            result = folder / "result.json"
            if done.returncode == -9 and len(jobs) == 1:
                return [{"out_of_memory": "the operating system ended the process"}]
            if done.returncode != 0 or not result.exists():
                raise CellfastError(
                    f"{self.name}: '{parts}' failed with status {done.returncode}:\n{_end_of(done.stderr)}{self._hint(done.stderr)}"
                )
            return json.loads(result.read_text(encoding="utf-8"))

    def _hint(self, text: str) -> str:
        if self.name != "reference" or "Error" not in text:
            return ""
        return (
            f"\nThe reference ran in {self.python}; give the interpreter of an environment it works in with --reference-python. "
            f"These versions work: pip install {PACKAGES}"
        )


def _end_of(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def cellfast_side(recipe: str = "perakis2021", *, parts: tuple[str, ...] | None = None, **values: Any) -> Side:
    """cellfast in this interpreter, with a recipe's values."""
    return Side("cellfast", HERE / "ours.py", values={"recipe": recipe, **values}, parts=parts)


def other_side(reference_dir: str | os.PathLike[str] | None, reference_python: str | None) -> Side:
    """The reference from a checkout, or where there is none the plain baseline.

    Raises:
        CellfastError: the folder is not such a checkout.
    """
    if reference_dir is None:
        if reference_python is not None:
            raise CellfastError("--reference-python belongs to --reference-dir: give the checkout too")
        return Side("baseline", HERE / "baseline.py")
    folder = Path(reference_dir).resolve()
    if not any((f / "simclr.py").is_file() and (f / "models" / "resnet_simclr.py").is_file() for f in (folder / "src", folder)):
        raise CellfastError(
            f"--reference-dir {reference_dir}: expected a checkout of SamriddhiJain/SimCLR-for-cell-profiling (src/simclr.py), found none"
        )
    return Side(
        "reference", HERE / "adapter.py", python=reference_python or sys.executable, values={"reference_dir": str(folder)}
    )


def checkout_commit(reference_dir: str | os.PathLike[str] | None) -> str:
    """The checkout's git commit; empty where it has none."""
    if reference_dir is None or not (Path(reference_dir) / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(reference_dir), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""

"""Who is compared: cellfast, and the reference's checkout or the plain baseline; each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cellfast.errors import CellfastError

HERE = Path(__file__).resolve().parent
PACKAGES = "albumentations==1.3.1 numpy==1.26.4 pandas==1.5.3 matplotlib==3.7.5 seaborn==0.11.2 opencv-python-headless==4.10.0.84 scikit-learn==1.3.2 scipy==1.11.4 scikit-image==0.22.0 imutils joblib tqdm pyyaml tensorboard torch torchvision"


class Side:
    """An implementation, and the process that carries out its jobs.

    Args:
        name: ``cellfast``, ``reference`` or ``baseline``.
        file: its `worker` implementation. python: the interpreter that runs it.
        parts: the parts it is measured in; None: all.
        keep: all jobs in one process; False: a new one for each.
        values: what every job of this side carries.
    """

    def __init__(
        self, name: str, file: str, *, python: str = sys.executable, parts: tuple[str, ...] | None = None, keep: bool = False,
        **values: Any,
    ) -> None:  # fmt: skip
        self.name, self.file, self.python, self.parts, self.keep, self.values = name, HERE / file, python, parts, keep, values
        self.process: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._threads = 0

    @property
    def label(self) -> str:
        """The side's name in results: cellfast's recipes are told apart."""
        recipe, pieces = self.values.get("recipe"), self.values.get("chunk_size")
        name = self.name if recipe in (None, "perakis2021") else f"{self.name}, {recipe} recipe"
        return name + (f", in pieces of {pieces}" if pieces else "") + (", bf16" if self.values.get("amp") else "")

    def run(self, part: str, *, threads: int, timeout: float | None = None, **job: Any) -> dict[str, Any]:
        """Carry out a job in a new process, or in the one that is kept; return what `worker` wrote, or ``timed_out`` or ``out_of_memory``.

        Raises:
            CellfastError: the process failed; the end of what it said is in the message.
        """
        if self.process is not None and threads != self._threads:
            self.close()  # the libraries' pools of threads are made once
        process = self.process or self.begin(threads)
        folder = Path(self._folder.name)
        result = folder / "result.json"
        work = {"part": part, "threads": threads, "folder": str(folder), **self.values, **job}
        (folder / "job.json").write_text(json.dumps({**work, "implementation": str(self.file), "result": str(result)}))
        # What the process says can end up in a full pipe or be held open by a child: files are waited for instead.
        until = None if timeout is None else time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{folder / 'job.json'}\n")
            process.stdin.flush()
        while not result.exists() and process.poll() is None:
            if until is not None and time.monotonic() > until:
                process.kill()
                self.close()
                return {"timed_out": timeout}
            time.sleep(0.02)
        if result.exists():
            values = json.loads(result.read_text(encoding="utf-8"))
            result.unlink()
            if not self.keep:
                self.close()
            return values
        said = (folder / "said.txt").read_text(encoding="utf-8", errors="replace")
        self.close()
        if process.returncode == -9:
            return {"out_of_memory": "the operating system ended the process"}
        end = "\n".join(said.strip().splitlines()[-12:])
        raise CellfastError(f"{self.name}: '{part}' failed with status {process.returncode}:\n{end}{self._hint(said)}", keep="\n")

    def begin(self, threads: int) -> subprocess.Popen[str]:
        """Start the process, which then imports its libraries and waits for jobs; its folder is the working directory."""
        self._threads, self._folder = threads, tempfile.TemporaryDirectory(prefix="cellfast-bench-")
        environment = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}}
        outside = environment.pop("PYTHONPATH", "")
        if self.name != "reference":
            # A source checkout need not be installed.
            environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(HERE.parents[2]), outside) if p)
        try:
            with open(Path(self._folder.name) / "said.txt", "wb") as out:
                self.process = subprocess.Popen(
                    [self.python, str(HERE / "worker.py")], env=environment, cwd=self._folder.name, stdin=subprocess.PIPE, stdout=out,
                    stderr=out, text=True,
                )  # fmt: skip
        except OSError as error:
            raise CellfastError(f"--reference-python {self.python}: cannot be run ({error})") from error
        return self.process

    def close(self) -> None:
        """End the process, where there is one, and remove its folder."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=30.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _hint(self, said: str) -> str:
        if self.name != "reference" or "Error" not in said:
            return ""
        return (
            f"\nThe reference ran in {self.python}; give the interpreter of an environment it works in with --reference-python. "
            f"These versions work: pip install {PACKAGES}"
        )


def cellfast_side(recipe: str = "perakis2021", **options: Any) -> Side:
    """cellfast in this interpreter, with a recipe's values."""
    return Side("cellfast", "ours.py", recipe=recipe, **options)


def other_side(reference_dir: str | os.PathLike[str] | None, reference_python: str | None = None, **options: Any) -> Side:
    """The reference from a checkout, or where there is none the plain baseline.

    Raises:
        CellfastError: the folder is not such a checkout.
    """
    if reference_dir is None:
        if reference_python is not None:
            raise CellfastError("--reference-python belongs to --reference-dir: give the checkout too")
        return Side("baseline", "baseline.py", **options)
    folder = Path(reference_dir).resolve()
    if not any((f / "simclr.py").is_file() and (f / "models" / "resnet_simclr.py").is_file() for f in (folder / "src", folder)):
        raise CellfastError(
            f"--reference-dir {reference_dir}: expected a checkout of SamriddhiJain/SimCLR-for-cell-profiling (src/simclr.py), found none"
        )
    return Side("reference", "adapter.py", python=reference_python or sys.executable, reference_dir=str(folder), **options)


def checkout_commit(reference_dir: str | os.PathLike[str] | None) -> str:
    """The checkout's git commit; empty where it has none."""
    if reference_dir is None or not (Path(reference_dir) / ".git").exists():
        return ""
    done = subprocess.run(["git", "-C", str(reference_dir), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""

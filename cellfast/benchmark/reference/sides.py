"""Who is compared: cellfast, and beside it the reference's checkout or the plain baseline; jobs run in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        kept: the process all jobs go to inside `one_process`.
    """

    name: str
    file: Path
    python: str = sys.executable
    values: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] | None = None
    kept: list[WorkerProcess] = field(default_factory=list, compare=False, repr=False)

    def run(self, part: str, *, threads: int, timeout: float | None = None, **job: Any) -> dict[str, Any]:
        """Measure ``part`` in a process of its own and return what `worker` wrote; see `run_several`."""
        return self.run_several([{"part": part, **job}], threads=threads, timeout=timeout)[0]

    def run_several(self, jobs: Sequence[dict[str, Any]], *, threads: int, timeout: float | None = None) -> list[dict[str, Any]]:
        """Measure ``jobs`` one after the other in one process: a new one, or inside `one_process` the one that is there.

        Raises:
            CellfastError: the process failed; the end of what it said is in the message.
        """
        if self.kept:
            return self._results(jobs, self.kept[0].run(jobs, threads=threads, timeout=timeout), timeout)
        with WorkerProcess(self, threads) as worker:
            return self._results(jobs, worker.run(jobs, threads=threads, timeout=timeout), timeout)

    @contextmanager
    def one_process(self, threads: int) -> Iterator[None]:
        """All that is measured inside happens in one process: libraries are imported once, memory is less exact."""
        with WorkerProcess(self, threads) as worker:
            worker.begin()
            self.kept.append(worker)
            try:
                yield
            finally:
                self.kept.clear()

    def _results(self, jobs: Sequence[dict[str, Any]], done: Outcome, timeout: float | None) -> list[dict[str, Any]]:
        if done.results is not None:
            return done.results
        if done.status is None:
            return [{"timed_out": timeout} for _ in jobs]
        if done.status == -9 and len(jobs) == 1:
            return [{"out_of_memory": "the operating system ended the process"}]
        parts = ", ".join(job["part"] for job in jobs)
        raise CellfastError(
            f"{self.name}: '{parts}' failed with status {done.status}:\n{_end_of(done.said)}{self._hint(done.said)}",
            keep="\n",
        )

    def _hint(self, text: str) -> str:
        if self.name != "reference" or "Error" not in text:
            return ""
        return (
            f"\nThe reference ran in {self.python}; give the interpreter of an environment it works in with --reference-python. "
            f"These versions work: pip install {PACKAGES}"
        )


@dataclass(frozen=True)
class Outcome:
    """What became of jobs: their results; else the process's exit status, None where it took too long, and what it said."""

    results: list[dict[str, Any]] | None
    status: int | None = None
    said: str = ""


class WorkerProcess:
    """`worker` in a process of its own, which carries out the jobs it is given until this is closed.

    Its folder is the working directory and is gone afterwards. A process that ended or took too long is begun anew for the next jobs.
    """

    def __init__(self, side: Side, threads: int) -> None:
        self._side, self._threads = side, threads
        self._temporary = tempfile.TemporaryDirectory(prefix="cellfast-bench-")
        self._folder = Path(self._temporary.name)
        self._said = self._folder / "said.txt"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._temporary.cleanup()

    def run(self, jobs: Sequence[dict[str, Any]], *, threads: int, timeout: float | None = None) -> Outcome:
        """Carry out ``jobs``; the time limit counts from here, a start included."""
        if threads != self._threads:
            raise ValueError(f"this process has {self._threads} threads, not {threads}: the libraries' pools are made once")
        result = self._folder / "result.json"
        common = {"threads": threads, "folder": str(self._folder), **self._side.values, "implementation": str(self._side.file)}
        work = {"result": str(result), "jobs": [{**common, **job} for job in jobs]}
        (self._folder / "jobs.json").write_text(json.dumps(work), encoding="utf-8")
        process = self._process or self.begin()
        assert process.stdin is not None
        # What the process says can end up in a full pipe or be held open by a child: files are waited for instead.
        until = None if timeout is None else time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(str(self._folder / "jobs.json") + "\n")
            process.stdin.flush()
        while not result.exists() and process.poll() is None:
            if until is not None and time.monotonic() > until:
                process.kill()
                self._end()
                return Outcome(None)
            time.sleep(0.02)
        if result.exists():
            values = json.loads(result.read_text(encoding="utf-8"))
            result.unlink()
            return Outcome(values)
        status = process.returncode
        self._end()
        return Outcome(None, status, self._said.read_text(encoding="utf-8", errors="replace"))

    def begin(self) -> subprocess.Popen[str]:
        """Start the process, which then imports its libraries and waits for jobs."""
        environment = {
            **os.environ,
            **{f"{name}_NUM_THREADS": str(self._threads) for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")},
        }
        if self._side.name == "reference":
            environment.pop("PYTHONPATH", None)
        else:
            # A source checkout need not be installed.
            paths = [str(HERE.parents[2]), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        try:
            with open(self._said, "wb") as out:
                self._process = subprocess.Popen(
                    [self._side.python, str(HERE / "worker.py")],
                    env=environment, cwd=self._folder, stdin=subprocess.PIPE, stdout=out, stderr=out, text=True,
                )  # fmt: skip
        except OSError as error:
            raise CellfastError(f"--reference-python {self._side.python}: cannot be run ({error})") from error
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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

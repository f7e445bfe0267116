"""Commands run in forked processes: a server imports everything once, so that a run costs no start-up."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

PACKAGE = __name__.rpartition(".")[0]


def context() -> ForkServerContext:
    """The server's context; a run has one thread, and the environment of this process stays as it is."""
    found, before = multiprocessing.get_context("forkserver"), dict(os.environ)
    found.set_forkserver_preload([f"{PACKAGE}.warm"])
    root = str(Path(__file__).resolve().parents[PACKAGE.count(".") + 1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", NUMBA_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(paths))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return found


@dataclass
class Ended:
    """How a command ended: its exit status, what it printed, and the exception that got through, if any."""

    status: int
    output: str
    error: str = ""
    where: str = ""
    memory: bool = False


def command(arguments: Sequence[str]) -> Ended:
    """Run ``cellfast ARGUMENTS`` in this process as the program does; warnings are shown, as for a user."""
    from cellfast.cli import main

    printed, old = io.StringIO(), sys.argv
    sys.argv = ["cellfast", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main()
        return Ended(0, printed.getvalue())
    except SystemExit as error:
        text = "" if error.code is None or isinstance(error.code, int) else str(error.code)
        status = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
        return Ended(status, printed.getvalue() + text)
    except BaseException as error:
        return Ended(
            70,
            printed.getvalue() + traceback.format_exc(),
            f"{type(error).__name__}: {error}",
            place(error),
            out_of_memory(error),
        )
    finally:
        sys.argv = old


def place(error: BaseException) -> str:
    """``file:line`` of an exception: of cellfast's own code, and of where it was raised when that is elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    short = [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in frames]
    own = [name for name, frame in zip(short, frames) if f"{os.sep}cellfast{os.sep}" in frame.filename]
    return short[-1] if not own or own[-1] == short[-1] else f"{own[-1]} ({short[-1]})"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception is about memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(w in text for w in ("can't allocate", "cannot allocate", "unable to allocate"))


def limit_memory(more: int) -> None:
    """Let this process grow by ``more`` bytes of address space."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def peak_memory(*, reset: bool = False) -> int:
    """The most bytes this process had in memory since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_and_exit(arguments: Sequence[str], log: str, die_at: tuple[str, int, bool] | None = None) -> None:
    """The body of a process that is one run of a command; standard output and error go to ``log``, the exit status is the command's.

    Args:
        die_at: (end of a name, n, after): the process kills itself just before, or just after, the n-th rename to such a name.
    """
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, buffering=1) for number in (1, 2))
    if die_at is not None:
        _die_at_rename(*die_at)
    from cellfast.cli import main

    sys.argv = ["cellfast", *map(str, arguments)]
    main()
    sys.stdout.flush()


def _die_at_rename(suffix: str, count: int, after: bool) -> None:
    seen = 0

    def wrapped(real):
        def rename(source, target, **more):
            nonlocal seen
            if str(target).endswith(suffix):
                seen += 1
                if seen == count:
                    if after:
                        real(source, target, **more)
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(source, target, **more)

        return rename

    os.replace, os.rename = wrapped(os.replace), wrapped(os.rename)


def count_renames(arguments: Sequence[str], log: str, counted: str) -> None:
    """As `run_and_exit`, and write the number of renames to the file ``counted``."""
    number, real, real_rename = 0, os.replace, os.rename

    def replace(source, target, **more):
        nonlocal number
        number += 1
        Path(counted).write_text(str(number))
        return real(source, target, **more)

    def rename(source, target, **more):
        nonlocal number
        number += 1
        Path(counted).write_text(str(number))
        return real_rename(source, target, **more)

    os.replace, os.rename = replace, rename
    run_and_exit(arguments, log)

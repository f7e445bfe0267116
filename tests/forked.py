"""Processes of a test without the seconds that importing torch takes: forked from a server that has imported it once."""

from __future__ import annotations

import os
from pathlib import Path

from fuzz.runs import context


def start_ranks(target, *arguments, processes=2):
    """``target(rank, *arguments)`` in so many processes; an error in one is raised here, as by `torch.multiprocessing.spawn`."""
    from torch.multiprocessing import start_processes

    context()
    start_processes(target, arguments, nprocs=processes, start_method="forkserver")


class Forked:
    """A process that runs ``code``, with what the tests use of `subprocess.Popen`; what it prints goes to files in ``folder``."""

    def __init__(self, code: str, environment: dict[str, str], folder: Path, name: str) -> None:
        self._said = [folder / f"{name}.out", folder / f"{name}.err"]
        self._process = context().Process(target=_run, args=(code, environment, [str(path) for path in self._said]))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"the process did not end in {timeout} s: {self._said[1].read_text()}")
        return self._said[0].read_text(), self._said[1].read_text()


def _run(code: str, environment: dict[str, str], said: list[str]) -> None:
    os.environ.update(environment)
    for descriptor, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    exec(compile(code, "<process>", "exec"), {"__name__": "__main__"})

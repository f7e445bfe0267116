"""Processes for pools: fresh interpreters that run nothing of the caller's script."""

from __future__ import annotations

import sys
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        # A child of "spawn" first runs the parent's main module, and a script without `if __name__ == "__main__"` would begin
        # anew there. Our work is functions of this package: the child is told of an empty one.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class FreshProcesses(SpawnContext):
    """A context for `multiprocessing` and process pools.

    Never fork: the parent may hold locks (HDF5, thread pools) in the state another thread left them in.
    """

    Process = _Process

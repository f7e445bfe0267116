"""Compiles inner loops with numba, and decides in one place where the compiled code is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numba

_SAID = "CELLFAST_UNCACHED_SAID"

# numba looks for its own variable first; this one is cellfast's, for an installation that cannot be written to.
if (_folder := os.environ.get("CELLFAST_CACHE")) and "NUMBA_CACHE_DIR" not in os.environ:
    numba.config.CACHE_DIR = os.path.join(_folder, "numba")  # type: ignore[attr-defined]


def njit(**options: Any) -> Callable[[Any], Any]:
    """``numba.njit(cache=True, nogil=True, **options)``, without the cache where there is nowhere to keep it.

    Compiled code is kept in ``$NUMBA_CACHE_DIR``, else in ``$CELLFAST_CACHE/numba``, else beside the module or in the user's
    cache folder. Where none of them can be written to, each process compiles anew (seconds); the first one says so on stderr. No
    folder for temporary files is tried: others could put code there that numba would load.
    """

    def decorate(function: Any) -> Any:
        compiled = numba.njit(nogil=True, **options)(function)
        try:
            compiled.enable_caching()
        except (RuntimeError, OSError) as error:
            _say(error)
        return compiled

    return decorate


def _say(error: Exception) -> None:
    # The environment is handed on to worker processes: they need not say it again.
    if os.environ.get(_SAID):
        return
    os.environ[_SAID] = "1"
    reason = "no folder for it can be written to" if "no locator" in str(error) else str(error)
    sys.stderr.write(
        f"compiled code is not kept ({reason}): every process compiles anew, which takes some seconds; "
        "set CELLFAST_CACHE to a folder of your own\n"
    )

"""Keep glibc from returning and re-faulting the large buffers that torch frees and allocates at every step on a CPU."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def tune_malloc() -> str:
    """Raise glibc's malloc thresholds for this process and say what was done.

    Equivalent to ``mallopt(M_MMAP_THRESHOLD, 1 GiB); mallopt(M_TRIM_THRESHOLD, 2 GiB − 1); mallopt(M_TOP_PAD, 256 MiB)``: buffers
    come from a heap that is kept, so their pages are faulted in once, not at every step. Costs up to 256 MiB of address space
    held, and freed memory stays with the process. Call it before the heavy work; calling it again changes nothing. On another C
    library nothing is changed.

    Returns:
        One line: what was set, or why nothing was.
    """
    libc = ctypes.CDLL(None)
    try:
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        version = libc.gnu_get_libc_version().decode()
        mallopt = libc.mallopt
    except AttributeError:
        return "malloc left as it is: the C library is not glibc"
    wanted = (("mmap threshold 1 GiB", _M_MMAP_THRESHOLD, 1 << 30), ("trim threshold 2 GiB", _M_TRIM_THRESHOLD, 2**31 - 1),
              ("top pad 256 MiB", _M_TOP_PAD, 256 << 20))  # fmt: skip
    done = [(name, mallopt(option, value) == 1) for name, option, value in wanted]
    refused = [name for name, ok in done if not ok]
    text = f"glibc {version} malloc: " + ", ".join(name for name, ok in done if ok)
    return text + (f"; refused: {', '.join(refused)}" if refused else "")

"""Progress of long work: a live bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from cellfast.printable import printable


def format_duration(seconds: float) -> str:
    """Format a duration as ``1:02:03`` or ``02:03``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes:02d}:{secs:02d}"


class Progress:
    """Count units of work on standard error with their rate and the time left.

    Args:
        label: what is being done, e.g. ``"ingest"``.
        total: number of units expected; 0 means unknown.
        unit: plural name of the unit, e.g. ``"cells"``; the rate is printed as ``<unit>/s``.
        enabled: False prints nothing (ranks other than 0).
        interval_s: seconds between lines where standard error is not a terminal.
    """

    def __init__(self, label: str, total: int, unit: str, *, enabled: bool = True, interval_s: float = 10.0) -> None:
        self.label, self.total, self.unit, self.enabled = label, total, unit, enabled
        self.done = 0
        self._live = sys.stderr.isatty()
        self._interval_s = 0.2 if self._live else interval_s
        self._start = self._last = time.monotonic()
        self._width = 0
        self._note = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Add ``count`` finished units; ``note`` replaces the free text at the end of the line."""
        self.done += count
        if note is not None:
            self._note = note
        now = time.monotonic()
        if self.enabled and now - self._last >= self._interval_s:
            self._last = now
            self._show(now)

    def line(self, now: float | None = None) -> str:
        """The progress line as text."""
        elapsed = max((time.monotonic() if now is None else now) - self._start, 1e-9)
        rate = self.done / elapsed
        parts = [f"{self.label}: {self.done:,}" + (f"/{self.total:,}" if self.total else "") + f" {self.unit}"]
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f} %")
        parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s")
        if self.total and 0 < self.done < self.total:
            parts.append(f"{format_duration((self.total - self.done) / rate)} left")
        else:
            parts.append(format_duration(elapsed))
        if self._note:
            parts.append(self._note)
        return printable(" · ".join(parts))

    def message(self, text: str) -> None:
        """Print a line of its own above the bar."""
        if self.enabled:
            if self._live and self._width:
                sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.write(printable(text) + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Print the final state and end the line; safe to call twice."""
        if self.enabled:
            self._show(time.monotonic())
            if self._live:
                sys.stderr.write("\n")
            sys.stderr.flush()
            self.enabled = False

    def _show(self, now: float) -> None:
        text = self.line(now)
        if self._live:
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

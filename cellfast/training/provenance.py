"""What made a model: the commit of the source it was trained with."""

from __future__ import annotations

import subprocess
from pathlib import Path


def source_commit() -> str:
    """The git commit of a source checkout, with ``-dirty`` where tracked files were changed; empty for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run(["git", "-C", str(root), "diff", "--quiet", "HEAD"], capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip() + ("-dirty" if changed.returncode == 1 else "") if commit.returncode == 0 else ""

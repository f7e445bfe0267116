"""Layers point one way: what each room may import, seen from a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imported(module: str) -> set[str]:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("cellfast", {"torch", "numpy", "pandas", "h5py", "kornia"}),
        ("cellfast.screens.crop_store", {"torch", "kornia", "nvidia.dali"}),
        ("cellfast.screens.ingest_fields", {"torch", "kornia", "nvidia.dali"}),
        ("cellfast.training.config", {"torch"}),
        ("cellfast.printable", {"numpy", "pandas"}),
        ("cellfast.metadata.names", {"torch", "h5py", "pyarrow", "cellfast.screens", "cellfast.profiles"}),
        ("cellfast.metadata.paths", {"torch", "h5py", "pyarrow", "cellfast.screens", "cellfast.profiles"}),
        ("cellfast.metadata.controls", {"torch", "h5py", "cellfast.screens", "cellfast.profiles"}),
        ("cellfast.ops", {"pandas", "h5py", "kornia", "nvidia.dali", "cellfast.data", "cellfast.models", "cellfast.screens"}),
        ("cellfast.data", {"nvidia.dali", "cellfast.training", "cellfast.models"}),
    ],
)
def test_a_room_does_not_import(module, never):
    assert not never & imported(module)


def test_the_command_line_reference_is_up_to_date():
    done = subprocess.run([sys.executable, "-m", "cellfast.cli.reference"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs" / "cli.md").read_text(), "run: python -m cellfast.cli.reference > docs/cli.md"

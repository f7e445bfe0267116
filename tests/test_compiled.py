"""Compiled loops run where nothing can be written: without a cache, said once, or with one where the user wants it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Loops are decorated where their modules are imported.
IMPORTS = "import cellfast.profiles.kernels, cellfast.screens.crop_writer, cellfast.data.gather"
CODE = """
import numpy as np
import cellfast
from cellfast.screens.cutting import cut_crops, crop_origins
print(cut_crops([np.arange(16, dtype=np.uint8).reshape(4, 4)], crop_origins([2], [2], 2), 2).ravel().tolist(), cellfast.__file__)
"""


@pytest.fixture
def installation(tmp_path):
    """A copy of the package in which no cache can be kept, for root neither: files stand where the folders would be."""
    package = tmp_path / "cellfast"
    shutil.copytree(ROOT / "cellfast", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (folder / "__pycache__").write_text("")
    return tmp_path


def run(installation, imports="", **more):
    (installation / "file").write_text("")
    nowhere = {name: str(installation / "file" / "x") for name in ("HOME", "XDG_CACHE_HOME")}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA_", "CELLFAST_"))}
    environment |= {"PYTHONPATH": str(installation), **nowhere, **more}
    done = subprocess.run(
        [sys.executable, "-c", imports + CODE], capture_output=True, text=True, env=environment, cwd=installation
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[5, 6, 9, 10] {installation}/cellfast/__init__.py\n"
    return done.stderr


def test_without_a_place_for_a_cache_it_compiles_anew_and_says_so_once(installation):
    said = run(installation, IMPORTS)
    assert said.count("compiled code is not kept") == 1
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["CELLFAST_CACHE", pytest.param("NUMBA_CACHE_DIR", marks=pytest.mark.slow)])
def test_the_cache_is_kept_where_the_user_wants_it(installation, name):
    assert run(installation, **{name: str(installation / "mine")}) == ""
    assert list((installation / "mine").rglob("cutting._cut*.nbi"))

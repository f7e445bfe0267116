"""The command line as a whole: it starts fast and light, and a wrong command is told which ones exist."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from cellfast.cli import COMMANDS, cellfast


def test_help_lists_every_command_without_importing_anything_heavy():
    code = (
        "import sys; from cellfast.cli import cellfast\n"
        "try: cellfast(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'pandas', 'h5py', 'kornia', 'numba', 'sklearn', 'matplotlib', 'nvidia.dali'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout


def test_unknown_command_names_the_known_ones():
    result = CliRunner().invoke(cellfast, ["trian"])
    assert result.exit_code == 2
    assert "trian" in result.output
    assert "train" in result.output


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_command_has_help(name):
    result = CliRunner().invoke(cellfast, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output

"""Messages name a parameter as whoever gave it knows it: in Python by its name, at the command line by its option."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import cellfast
from cellfast.cli import COMMANDS
from cellfast.cli import cellfast as program
from cellfast.errors import CellfastError, option, told_at_command_line
from cellfast.screens.crop_index import read_crop_index

PACKAGE = Path(cellfast.__file__).parent
# Not yet: data, profiles.
ROOMS = (
    "augment",
    "embedding",
    "export",
    "storage",
    "embeddings_folder.py",
    "declared.py",
    "metadata",
    "models.py",
    "model_file.py",
    "losses.py",
    "ops",
    "screens",
    "training",
    "atomic.py",
    "system.py",
)
FLAG = re.compile(r"(?:^|[\s(`'\"])--[a-z][\w-]*")
# Lines to type, of this program and of others.
COMMAND = re.compile(
    r"`cellfast [^`]*`|^ --model $|cellfast train SCREEN -o RUN [^.]*|torchrun --[\w-]+|build_ext --inplace|cellpose --\w+ or --\w+"
)


def sources() -> list[Path]:
    found = [file for room in ROOMS for file in ([PACKAGE / room] if room.endswith(".py") else (PACKAGE / room).rglob("*.py"))]
    return sorted(found)


def texts(tree: ast.AST) -> list[str]:
    """The strings of a module that are neither docstrings nor arguments of another program."""
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(id(node.value))
        if isinstance(node, ast.List):
            left_out |= {id(one) for one in node.elts}
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in left_out]


def test_a_parameter_is_named_as_it_was_given() -> None:
    given = [("crop_size",), ("border", "pad"), ("force", True), ("columns", {"well": "Well"}), ("lam", "0.1x"), ("threads", 2)]
    assert [option(*one) for one in given] == [
        "crop_size", "border='pad'", "force=True", "columns={'well': 'Well'}", "lam='0.1x'", "threads=2",
    ]  # fmt: skip
    with told_at_command_line():
        assert [option(*one) for one in given] == [
            "--crop-size", "--border pad", "--force", "--column well=Well", "--lambda 0.1x", "--threads 2",
        ]  # fmt: skip
        assert option("batch_regex", r"^(\w+) ") == r"--batch-regex '^(\w+) '"
        assert option("controls", "compound == 'DMSO'") == "--controls \"compound == 'DMSO'\""
    assert option("crop_size") == "crop_size"


def test_the_same_mistake_in_python_and_at_the_command_line(tmp_path: Path) -> None:
    index = tmp_path / "index.csv"
    index.write_text("file,plate\na.npy,P1\n")
    with pytest.raises(CellfastError, match=r"^root='.*nowhere': no such folder"):
        read_crop_index(index, root=tmp_path / "nowhere")
    arguments = ["ingest", "crops", str(index), "--root", str(tmp_path / "nowhere"), "-o", str(tmp_path / "s")]
    assert re.match(r"--root .*nowhere: no such folder", str(CliRunner().invoke(program, arguments).exception))


def test_no_message_of_the_library_names_an_option_of_the_command_line() -> None:
    found = [
        (file.relative_to(PACKAGE).as_posix(), text)
        for file in sources()
        for text in texts(ast.parse(file.read_text(encoding="utf-8")))
        if FLAG.search(COMMAND.sub("", text))
    ]
    assert not found, "name parameters with cellfast.errors.option"


def test_every_parameter_that_messages_name_is_an_option() -> None:
    known: set[str] = set()

    def collect(command: click.Command) -> None:
        known.update(flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts))
        for one in getattr(command, "commands", {}).values():
            collect(one)

    for name in COMMANDS:
        command = program.get_command(click.Context(program), name)
        assert command is not None
        collect(command)
    with told_at_command_line():
        for file in PACKAGE.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "option" and node.args:
                    if isinstance(node.args[0], ast.Constant):
                        assert option(node.args[0].value) in known, f"{file.name}:{node.lineno}: {node.args[0].value}"

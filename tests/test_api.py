"""The steps as Python functions: from images to scores in ten lines, with the commands' names and defaults."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import cellfast
from cellfast.cli import cellfast as program

# A command's name for a parameter → the function's; None: only at the command line.
RENAMED = {
    "ingest fields": {"screen": "out"},
    "ingest crops": {"screen": "out"},
    "train": {"run": "out", "config_file": "config", "assignments": None},
    "embed": {"model_path": "model"},
    "profile": {"output": "out", "steps": "normalize", "rules": "select"},
    "evaluate": {"output": "out", "map_method": "map", "compare": None},
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Every step on two simulated plates, with what it said."""
    work = tmp_path_factory.mktemp("api")
    said: list[str] = []
    images = cellfast.simulate(
        work / "images", "small", plates=2, weeks=1, moas=2, sites=1, wells=12, controls=2, doses=1, field_size=(192, 256),
        scale=0.4, cells_per_field=6, workers=1,
    )  # fmt: skip
    screen = cellfast.ingest_fields(
        images.image_csv, work / "screen", image_root=images.images, locations=images.locations, moa=images.moa_csv,
        channels="DAPI, Tubulin, Actin", crop_size=32, workers=1, say=said.append,
    )  # fmt: skip
    run = cellfast.train(screen, work / "run", encoder="cnn4", projection_dim=8, batch_size=16, steps=1, say=said.append)
    embeddings = cellfast.embed(screen, work / "embeddings", model=run)
    profiles = cellfast.profile(embeddings, work / "profiles.parquet", lam="0.1x", select="variance")
    result = cellfast.evaluate(profiles, work / "result.json", map="none", num_permutations=10)
    return {"images": images, "screen": screen, "run": run, "embeddings": embeddings, "profiles": profiles, "result": result,
            "said": said, "work": work}  # fmt: skip


def test_from_images_to_scores(steps):
    assert steps["screen"].num_cells == steps["embeddings"].summary.cells > 50
    assert any("cells found" in line for line in steps["said"])  # the ledger
    assert len(steps["profiles"].table) == len(steps["profiles"].built.profiles.metadata)
    written = json.loads((steps["work"] / "result.json").read_text())
    assert steps["result"].nsc == written["nsc"]["accuracy"]
    assert steps["result"].nscb == written["nscb"]["accuracy"]
    assert [path.suffix for path in steps["result"].pictures] == [".png"] * len(steps["result"].pictures) != []
    # What one step returns stands for its files.
    for name, file in (("screen", "plates"), ("run", "model.pt"), ("embeddings", "embeddings.json")):
        assert (Path(steps[name]) / file).exists()
    assert str(cellfast.load_model(steps["run"]).path) == str(steps["work"] / "run" / "model.pt")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("images", r"cells in .* fields of 2 plates; .* 2 MoAs"),
        ("screen", r"screen .*screen: \d+ cells of 32 px, uint16, on 2 plates of 1 batches; channels DAPI, Tubulin, Actin"),
        ("run", r"run .*run: 1 steps, loss "),
        ("embeddings", r"rows of \d+ features in 2 plates, \d+ cells"),
        ("profiles", r"profiles .*profiles.parquet: \d+ × \d+ features\nread "),
        ("result", r"(?s)NSC .*written .*result\.json"),
    ],
)
def test_what_a_step_returns_shows_itself(steps, name, shown):
    text = repr(steps[name])
    assert re.search(shown, text), text
    html = steps[name]._repr_html_()
    assert html.startswith("<pre>")
    assert "<" not in html[5:-6]


def test_a_model_shows_what_it_takes(steps):
    assert "cnn4" in repr(cellfast.load_model(steps["run"]))


def test_mistakes_are_named_as_in_python(steps, tmp_path):
    with pytest.raises(cellfast.CellfastError, match=r"embed: there is no parameter 'batchsize'; did you mean 'batch_size'\?"):
        cellfast.embed(steps["screen"], tmp_path / "e", model=steps["run"], batchsize=3)
    with pytest.raises(cellfast.CellfastError, match=r"locations, border: only for fields"):
        cellfast.embed(steps["screen"], tmp_path / "e", model=steps["run"], locations="detect", border="drop")
    with pytest.raises(cellfast.CellfastError, match=r"unknown key 'learning_rate' \(did you mean lr\?\)"):
        cellfast.train(steps["screen"], tmp_path / "r", learning_rate=1)
    with pytest.raises(cellfast.CellfastError, match="fields need locations"):
        cellfast.ingest_fields(steps["images"].image_csv, tmp_path / "s", image_root=steps["images"].images)
    with pytest.raises(cellfast.CellfastError, match=r"batch_regex='\(' is not a regular expression"):
        cellfast.ingest_crops("index.csv", tmp_path / "s", batch_regex="(")
    with pytest.raises(cellfast.CellfastError, match="preset must be one of bbbc021, demo, small, got 'big'"):
        cellfast.simulate(tmp_path / "i", "big")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["simulate", "ingest fields", "ingest crops", "train", "embed", "profile", "evaluate"])
def test_a_function_has_the_command_s_names_and_defaults(name):
    command: click.Command | None = program
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    parameters = inspect.signature(getattr(cellfast, name.replace(" ", "_"))).parameters
    renamed = RENAMED.get(name, {})
    for one in command.params:
        called = renamed.get(one.name, one.name)
        if not isinstance(one, click.Option) or called is None:
            continue
        assert called in parameters, f"{one.opts[0]} is no parameter"
        default = one.get_default(click.Context(command))
        # None and False: not given; what decides then may have another default, as the recipe of a training.
        if isinstance(default, (str, int, float)) and default is not False:
            assert str(parameters[called].default) == str(default), one.name


def test_the_public_names(monkeypatch):
    tree = ast.parse(Path(cellfast.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == cellfast._PUBLIC
    assert sorted(cellfast.__all__) == sorted(["__version__", *cellfast._PUBLIC])
    assert set(cellfast.__all__) <= set(dir(cellfast))
    for name in cellfast.__all__:
        assert getattr(cellfast, name) is not None


def test_a_script_needs_no_guard(tmp_path):
    """Worker processes run nothing of the script that starts them."""
    (tmp_path / "index.csv").write_text("file,plate,well\n" + "".join(f"{i}.npy,P{i},A01\n" for i in range(2)))
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np, cellfast\n"
        "print('begun')\n"
        "for i in range(2):\n"
        "    np.save(f'{i}.npy', np.arange(i, i + 12 * 12 * 3, dtype=np.uint16).reshape(12, 12, 3))\n"
        "print(cellfast.ingest_crops('index.csv', 'screen', workers=2))\n"
    )
    root = str(Path(cellfast.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begun") == 1
    assert "2 cells of 12 px" in done.stdout

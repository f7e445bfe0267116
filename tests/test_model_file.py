"""Model files: they carry what embedding needs, older and newer ones are read, other screens and damage are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cellfast import __version__
from cellfast.cli import cellfast
from cellfast.errors import CellfastError
from cellfast.model_file import ModelMetadata, load_model, save_model
from cellfast.models import ModelConfig, build_model
from cellfast.screens import Screen
from cellfast.training.config import TrainConfig
from cellfast.training.loop import source_commit, train
from cellfast.training.split import data_digest

CHANNELS = ["DNA", "Tubulin", "Actin"]


def metadata(**changes) -> ModelMetadata:
    values = dict(
        channel_names=CHANNELS, crop_size=24, output_size=16, bits=16, scaling="screen", low=[1.0, 2.0, 3.0], high=[10.0, 20.0, 30.0]
    )  # fmt: skip
    return ModelMetadata(**{**values, **changes})


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "model.pt"
    save_model(path, build_model(ModelConfig(encoder="cnn4", num_channels=3), 0), metadata())
    return path


def change(path: Path, edit) -> None:
    content = torch.load(path, weights_only=True)
    edit(content)
    content.pop("sealed", None)
    torch.save(content, path)


def test_training_writes_all_that_embedding_needs(screen, tmp_path):
    screen = Screen.open(screen)
    config = TrainConfig(
        encoder="cnn4", batch_size=16, output_size=16, steps=1, device="cpu", threads=1, validation_cells=8, projection_dim=4
    )
    result = train(screen.path, tmp_path / "run", config, say=lambda text: None)
    meta = load_model(result.model).metadata
    low, high = screen.channel_scaling()
    assert meta.channel_names == CHANNELS
    assert (meta.crop_size, meta.output_size, meta.bits, meta.scaling, meta.step) == (24, 16, 16, "screen", 1)
    np.testing.assert_allclose(meta.low, low)
    np.testing.assert_allclose(meta.high, high)
    assert meta.training_data == data_digest(screen)
    assert meta.cellfast_version == __version__
    assert meta.git_commit == source_commit()
    shown = CliRunner().invoke(cellfast, ["info", str(tmp_path / "run"), "--json"])
    described = json.loads(shown.output)
    assert [c["name"] for c in described["channels"]] == CHANNELS
    assert described["training_data"] == meta.training_data
    assert (described["dtype"], described["crop_size_px"], described["cellfast_version"]) == ("uint16", 24, __version__)
    text = CliRunner().invoke(cellfast, ["info", str(result.model)]).output
    assert meta.training_data in text
    assert "Tubulin" in text


def test_files_of_other_versions_are_read(path):
    before = load_model(path)

    def older(content):
        for name in ("cellfast_version", "git_commit", "training_data", "step", "extra"):
            del content["metadata"][name]

    change(path, older)
    loaded = load_model(path)
    # Unknown is not this version.
    assert (loaded.metadata.cellfast_version, loaded.metadata.git_commit, loaded.metadata.training_data) == ("", "", "")
    assert loaded.digest == before.digest
    assert "unknown version" in CliRunner().invoke(cellfast, ["info", str(path)]).output
    change(path, lambda content: content["metadata"].update(microscope="new"))
    assert load_model(path).metadata == loaded.metadata
    change(path, lambda content: content.update(format_version=99))
    with pytest.raises(CellfastError, match=r"model format 99.* reads up to 1: upgrade"):
        load_model(path)


@pytest.mark.parametrize(
    ("channels", "size", "bits", "says"),
    [
        (["DNA", "Actin", "Tubulin"], 24, 16, "the model has DNA, Tubulin, Actin, the screen has DNA, Actin, Tubulin .the same channels in"),
        (["DNA", "ER"], 24, 16, r"channels: the model has DNA, Tubulin, Actin, the screen has DNA, ER\. "),
        (CHANNELS, 32, 16, "crop size: the model has 24 px, the screen has 32 px"),
        (CHANNELS, 24, 8, "pixels: the model has 16-bit, the screen has 8-bit"),
        (["A"], 32, 8, "channels: .*crop size: .*pixels: "),
    ],
)  # fmt: skip
def test_a_screen_that_does_not_fit_is_refused_with_both_sides(path, channels, size, bits, says):
    loaded = load_model(path)
    loaded.check_screen("S", CHANNELS, 24, 16)
    with pytest.raises(CellfastError, match=says):
        loaded.check_screen("S", channels, size, bits)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c["state"]["encoder.features.0.weight"].mul_(1.001), "does not match the digest"),
        (lambda c: c["metadata"].update(low=[1.0, 2.0, 4.0]), "does not match the digest"),
        (lambda c: c["metadata"].update(channel_names=["DNA", "Actin", "Tubulin"]), "does not match the digest"),
        (lambda c: c["metadata"].update(bits=12), "bits must be 8 or 16, got 12"),
        (lambda c: c["metadata"].update(low=[1.0, 2.0, float("nan")]), "finite low <= high"),
        (lambda c: c["metadata"].update(low=None), "damaged"),
        (lambda c: c["metadata"].pop("crop_size"), "damaged.*crop_size"),
        (lambda c: c.update(metadata=7), "damaged"),
        (lambda c: c.update(state={"a": 1}), "damaged"),
        (lambda c: c.pop("format_version"), "names no format version"),
        (lambda c: c["config"].update(attention=True), "keys this version does not know: attention; upgrade"),
    ],
)
def test_damage_and_contradictions_are_told_with_the_files_name(path, edit, says):
    change(path, edit)
    with pytest.raises(CellfastError, match=says) as refused:
        load_model(path)
    assert str(path) in str(refused.value)


def test_a_model_of_other_channels_than_it_names_is_not_written(tmp_path):
    with pytest.raises(CellfastError, match=r"takes 2 channels, but the model names 3 \(DNA, Tubulin, Actin\)"):
        save_model(tmp_path / "model.pt", build_model(ModelConfig(encoder="cnn4", num_channels=2), 0), metadata())
    assert not (tmp_path / "model.pt").exists()


def test_the_digest_follows_what_decides_an_embedding_and_nothing_else(tmp_path):
    model = build_model(ModelConfig(encoder="cnn4", num_channels=3), 0)
    digest = save_model(tmp_path / "a.pt", model, metadata())
    assert save_model(tmp_path / "b.pt", model, metadata(git_commit="abc", step=9, training_data="f" * 64)) == digest
    for other in (metadata(bits=8), metadata(output_size=15), metadata(scaling="plate"), metadata(high=[10.0, 20.0, 31.0])):
        assert save_model(tmp_path / "c.pt", model, other) != digest

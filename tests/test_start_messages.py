"""What is said about the start of a model, about ways out, and which cells a comparison takes: nothing that is not so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from screens import SMALL

from cellfast.benchmark.reference.cells import drawn_cells
from cellfast.errors import CellfastError
from cellfast.model_file import load_weights
from cellfast.models import ModelConfig, build_model
from cellfast.profiles.normalize import normalize_profiles
from cellfast.profiles.steps import parse_steps
from cellfast.profiles.table import ProfileTable
from cellfast.training.config import TrainConfig
from cellfast.training.loop import train


def test_a_model_that_starts_from_weights_is_not_called_random(screen, tmp_path):
    said: list[str] = []
    config = TrainConfig(**{**SMALL, "steps": 0})
    first = train(screen, tmp_path / "a", config, say=said.append)
    assert any("is randomly initialised" in line for line in said)
    said.clear()
    train(screen, tmp_path / "b", replace(config, weights=str(first.model)), say=said.append)
    assert not any("randomly" in line for line in said)
    assert any(f"holds the weights of {first.model} as they are" in line for line in said)


@pytest.mark.parametrize(
    ("prefixes", "named"),
    [(("net.",), "'net.' (20 tensors)"), (("encoder_q.", "encoder_k."), "'encoder_q.' (20 tensors), 'encoder_k.' (20 tensors)")],
)
def test_weights_of_an_unknown_prefix_name_it(tmp_path, prefixes, named):
    model = build_model(ModelConfig(encoder="cnn4", num_channels=2), seed=0)
    state = model.encoder.state_dict()
    torch.save({prefix + name: value for prefix in prefixes for name, value in state.items()}, tmp_path / "w.pt")
    with pytest.raises(CellfastError) as error:
        load_weights(model, tmp_path / "w.pt")
    assert named.replace("20", str(len(state))) in str(error.value)
    assert "'module.', 'encoder.', 'backbone.'" in str(error.value)
    torch.save({"visual.stem.weight": torch.zeros(3), "visual.head.weight": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(CellfastError, match=r"begin with 'visual\.' \(2 tensors\)"):
        load_weights(model, tmp_path / "w.pt")


@pytest.mark.parametrize("by", ["plate", "batch", "all"])
@pytest.mark.parametrize("controls", ["", "all"])
def test_a_way_out_is_never_what_was_asked_for(by, controls):
    metadata = pd.DataFrame(
        {"Metadata_Plate": list("PPQQ"), "Metadata_Batch": list("bbcc"), "Metadata_Compound": ["DMSO", "DMSO", "DMSO", "DMSO"]}
    )
    table = ProfileTable(metadata, np.ones((4, 2)), ["a", "b"])
    for method in ("standardize", "mad_robustize"):
        step = f"{method}:by={by}" + (f",controls={controls}" if controls else "")
        with pytest.raises(CellfastError) as error:
            normalize_profiles(table, parse_steps([step]))
        ways = str(error.value).partition("Choose ")[2]
        assert ways
        assert f"--by {by}" not in ways
        assert ("--controls all" in ways) == (not controls)


def screen_of(batches, controls_in, cells_per_well=4):
    rows = []
    for batch in range(batches):
        for well in range(8):
            compound = "DMSO" if well == 0 and batch in controls_in else f"c{well}"
            rows += [(f"Week{batch + 1}_1", f"A{well + 1:02d}", compound)] * cells_per_well
    return pd.DataFrame(rows, columns=["Metadata_Plate", "Metadata_Well", "Metadata_Compound"])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_cells", [16, 24, 72, 320])
def test_drawn_cells_have_controls_in_every_batch(num_cells, seed):
    metadata = screen_of(10, range(1, 10))
    rows = drawn_cells(metadata, num_cells, seed, "s")
    assert len(rows) == len(set(rows)) == min(num_cells, 9 * 32)
    assert list(rows) == sorted(rows)
    drawn = metadata.iloc[rows]
    controls = drawn[drawn["Metadata_Compound"] == "DMSO"]
    assert set(controls["Metadata_Plate"]) == set(drawn["Metadata_Plate"])
    assert len(controls[["Metadata_Plate", "Metadata_Well"]].drop_duplicates()) >= 2
    assert (drawn["Metadata_Compound"] != "DMSO").any()


def test_too_few_controls_are_said():
    with pytest.raises(CellfastError, match="1 control wells"):
        drawn_cells(screen_of(3, [1]), 20, 0, "s")
    with pytest.raises(CellfastError, match="0 control wells"):
        drawn_cells(screen_of(3, []), 20, 0, "s")

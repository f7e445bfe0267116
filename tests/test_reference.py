"""cellfast beside the reference implementation: the same numbers from the same crops and weights, and what the comparison reports."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from screens import write_crops

from cellfast.augment import AugmentConfig, TwoViews, center_crop
from cellfast.benchmark.reference.baseline import Implementation as Baseline
from cellfast.benchmark.reference.baseline import nt_xent, plain_scores
from cellfast.benchmark.reference.cells import EVALUATION_COLUMNS, drawn_cells, prepare_cells, simulated_features
from cellfast.benchmark.reference.measure import check_reference_size, measure_agreement, measure_reference, summary
from cellfast.benchmark.reference.ours import Implementation as Ours
from cellfast.benchmark.reference.quality import score_features
from cellfast.benchmark.reference.report import document, markdown
from cellfast.benchmark.reference.scaling import repeated_cells
from cellfast.benchmark.reference.sides import cellfast_side, other_side
from cellfast.benchmark.reference.table import PARTS, Settings
from cellfast.benchmark.reference.worker import measure
from cellfast.cli import cellfast
from cellfast.embedding.encoder import CropEncoder
from cellfast.errors import CellfastError
from cellfast.model_file import load_model
from cellfast.models import INPUT_TRANSFORMS, ModelConfig, build_model
from cellfast.ops import ntxent_loss
from cellfast.screens import Screen
from cellfast.training import config as training_config
from cellfast.training.config import resolve_config
from cellfast.training.loop import train

MEAN, STD = np.array((0.7469, 0.7403, 0.7307)), np.array((0.1548, 0.1594, 0.1706))
SIZE = 30


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Two plates of 20 cells, 8 bit, all values from 0 to 255."""
    folder = tmp_path_factory.mktemp("screen")
    rng = np.random.default_rng(0)
    for plate in ("Week1_1", "Week2_1"):
        fields = []
        for number, compound in enumerate(("DMSO", "a", "b", "c")):
            told = {"well": f"B{number + 2:02d}", "compound": compound, "concentration": float(number), "moa": compound.upper()}
            fields.append((rng.integers(0, 256, (5, 3, 34, 34), dtype=np.uint8), told))
        write_crops(folder, plate, fields)
    return folder


@pytest.fixture(scope="module")
def cells(screen, tmp_path_factory):
    return prepare_cells(screen, tmp_path_factory.mktemp("cells"), size=SIZE)


def reference_input(pixels: np.ndarray) -> np.ndarray:
    """8-bit pixels [..., C, s, s] as the reference's encoder sees them: wrapped, scaled, normalised."""
    return (((256 - pixels.astype(int)) % 256) / 255 - MEAN[:, None, None]) / STD[:, None, None]


# What the reference does to its input


def test_the_input_transform_wraps_every_8_bit_value_as_the_reference_does():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    model = build_model(ModelConfig("cnn4", input_transform="perakis2021"), seed=0)
    seen = model.input_transform(torch.from_numpy(pixels).float() / 255)
    np.testing.assert_allclose(seen.numpy(), reference_input(pixels), atol=2e-6)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model.encode(x), model.encoder(model.input_transform(x)))


def test_views_of_the_inverted_image_reach_the_encoder_inverted_once():
    pixels = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    low, high = torch.zeros(3), torch.full((3,), 255.0)
    model = build_model(ModelConfig("cnn4", input_transform="perakis2021"), seed=0)
    still = TwoViews(AugmentConfig.preset("none", inverted=True), 3, 24, 16)(pixels, low, high, seed=0)
    expected = reference_input(pixels.numpy()[:, :, 4:20, 4:20])
    for views in (still[:4], still[4:], center_crop(pixels, low, high, 16)):
        np.testing.assert_allclose(model.input_transform(views).numpy(), expected, atol=2e-5)
    # Brightness multiplies the inverted image and is clamped at its white.
    bright = TwoViews(AugmentConfig.preset("none", inverted=True, jitter_p=1.0, contrast=0.0, brightness=0.5), 3, 24, 16)
    gain = bright.draw(4, 7).gain.numpy()[:, :, None, None]
    inverse = (256 - pixels.numpy()[:, :, 4:20, 4:20].astype(int)) % 256 / 255
    expected = (np.clip(gain * np.concatenate([inverse] * 2), 0, 1) - MEAN[:, None, None]) / STD[:, None, None]
    np.testing.assert_allclose(model.input_transform(bright(pixels, low, high, seed=7)).numpy(), expected, atol=2e-5)


def test_a_model_without_input_transform_is_described_as_before_it_existed():
    assert "input_transform" not in ModelConfig().to_dict()
    assert ModelConfig.from_dict(ModelConfig(input_transform="perakis2021").to_dict()).input_transform == "perakis2021"
    assert training_config.INPUT_TRANSFORMS == INPUT_TRANSFORMS
    with pytest.raises(CellfastError, match="input_transform 'invert'"):
        ModelConfig(input_transform="invert")


def test_the_recipe_trains_on_raw_8_bit_pixels_and_its_model_file_embeds_them_inverted(screen, tmp_path):
    config = resolve_config(
        "perakis2021",
        overrides={
            "encoder": "cnn4",
            "batch_size": 8,
            "output_size": 24,
            "steps": 2,
            "validation": "none",
            "threads": 1,
            "device": "cpu",
        },
    )
    assert (config.input_transform, config.augment["inverted"], config.batch_norm, config.lr) == (
        "perakis2021",
        True,
        "per-view",
        3e-4,
    )
    train(screen, tmp_path / "run", config, say=lambda text: None)
    model = load_model(tmp_path / "run", "cpu")
    assert (model.metadata.scaling, model.low.tolist(), model.high.tolist()) == ("screen", [0] * 3, [255] * 3)
    crops = torch.from_numpy(np.array(Screen.open(screen).plates[0].crops()[:4]))
    seen = model.model.input_transform(center_crop(crops, model.low, model.high, 24))
    np.testing.assert_allclose(seen.numpy(), reference_input(crops.numpy()[:, :, 5:29, 5:29]), atol=2e-5)


@pytest.mark.parametrize("features", ["h", "z"])
@pytest.mark.parametrize("transform", ["none", "perakis2021"])
def test_embedding_is_the_models_own_function_with_its_input_transform(features, transform):
    model = build_model(ModelConfig("resnet18", input_transform=transform), seed=0).eval()
    low, high = torch.zeros(3), torch.full((3,), 255.0)
    loaded = SimpleNamespace(model=model, scaling="screen", low=low, high=high, output_size=24)
    crops = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(center_crop(crops, low, high, 24))[features == "z"]
    got = CropEncoder(loaded, features=features, device=torch.device("cpu"))(crops, low, high)
    torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


# Number by number


def agreement_job(cells, tmp_path, **more):
    return {**cells.job(), "part": "agree", "encoder": "resnet18", "batch_size": 8, "dim": 32, "workers": 0, "steps": 3,
            "weights": str(tmp_path / "w.pt"), "inputs": str(tmp_path / "i.npy"), **more}  # fmt: skip


@pytest.mark.parametrize("double", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_steps_equal_a_plain_implementation_from_the_same_weights_and_crops(cells, tmp_path, monkeypatch, double):
    monkeypatch.setitem(training_config.RECIPES["perakis2021"], "projection_dim", 32)
    job = agreement_job(cells, tmp_path, double=double)
    plain = measure(Baseline(job), job)
    ours = measure(Ours(job), job)
    assert ours["largest_input_difference"] < 2e-6
    assert len(set(np.round(plain["losses"], 6))) == 3  # the weights moved
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], abs=1e-5)
    if double:
        np.testing.assert_allclose(ours["losses"], plain["losses"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(ours["features"], plain["features"], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_training_steps_equal_the_reference_implementation(cells):
    folder = os.environ.get("CELLFAST_REFERENCE_DIR")
    if not folder:
        pytest.skip(
            "needs a checkout of the reference implementation: set CELLFAST_REFERENCE_DIR, and CELLFAST_REFERENCE_PYTHON to a Python it runs in"
        )
    other = other_side(folder, os.environ.get("CELLFAST_REFERENCE_PYTHON"))
    found = measure_agreement(cellfast_side(), other, cells, Settings(threads=1), batch_size=8, steps=3)
    assert found["float32"]["largest_input_difference"] < 2e-6
    assert found["float32"]["first_loss_difference"] < 1e-5
    assert found["float64"]["largest_loss_difference"] < 1e-9
    assert found["float64"]["largest_feature_difference"] < 1e-9


def test_the_baseline_loss_is_the_operator_s():
    z = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nt_xent(z[:6], z[6:]), ntxent_loss(z, 0.1))


def test_scores_equal_the_plain_steps():
    features, metadata = simulated_features(2500, 24)
    assert metadata["moa"].nunique() == 13
    assert metadata[metadata["compound"] != "DMSO"].groupby(["compound", "concentration"]).ngroups == 103
    assert Ours({}).score(features, metadata) == pytest.approx(plain_scores(features, metadata), abs=1e-12)


# The cells of both sides


def test_strips_and_crop_store_hold_the_same_cells_in_the_same_order(screen, cells):
    from PIL import Image

    source, made = Screen.open(screen), Screen.open(cells.screen)
    index, metadata = pd.read_csv(cells.index), pd.read_csv(cells.metadata)
    low, high = (v[:, None, None] for v in source.channel_scaling())
    assert made.num_cells == source.num_cells == len(index) == cells.num_cells == 40
    pixels = np.concatenate([plate.crops() for plate in made.plates])
    originals = np.concatenate([plate.crops() for plate in source.plates])[:, :, 2:32, 2:32]
    for row, (name, label) in enumerate(zip(index["Image_Name"], index["Class_Name"])):
        strip = np.asarray(Image.open(cells.strips / name))
        np.testing.assert_array_equal(np.stack(np.split(strip, 3, axis=1)), pixels[row])
        number = int(name.rpartition("_")[2].removesuffix(".png"))
        scaled = (np.clip((originals[number] - low) / (high - low), 0, 1) * 255).round()
        assert np.abs(scaled - pixels[row]).max() <= 1  # float32 rounding at a half
        one = source.metadata().iloc[number]
        assert name.startswith(f"{one['Metadata_Plate']}-{one['Metadata_Well']}-s1_")
        assert label == f"{one['Metadata_Compound']}_{one['Metadata_Concentration']}"
        assert metadata["moa"][row] == one["Metadata_MoA"]
        assert metadata["Metadata_Well"][row] == one["Metadata_Well"]


def test_cells_can_be_enlarged_chosen_and_repeated(screen, cells, tmp_path):
    larger = prepare_cells(screen, tmp_path / "a", size=50, num_cells=10)
    assert Screen.open(larger.screen).crop_size == 50
    assert larger.num_cells == 10
    (tmp_path / "b").mkdir()
    many = repeated_cells(cells, 90, tmp_path / "b")
    assert Screen.open(many.screen).num_cells == len(pd.read_csv(many.index)) == 90
    with pytest.raises(CellfastError, match="50 cells were asked for, it has 40"):
        prepare_cells(screen, tmp_path / "c", size=SIZE, num_cells=50)


def test_cells_of_other_than_three_channels_are_refused(tmp_path):
    write_crops(tmp_path, "P", [(np.zeros((1, 1, 8, 8), np.uint8), {})], channels=("a",))
    with pytest.raises(CellfastError, match="takes crops of 3 channels, found 1"):
        prepare_cells(tmp_path, tmp_path / "cells", size=8)


def test_scores_are_the_published_convention_where_some_cannot_be_right():
    """A MoA of one compound, and treatments of two weeks beside those of one: the sides must count them alike."""
    rng, rows = np.random.default_rng(3), []
    for week in (1, 2, 3):
        for well in range(4):
            rows.append((f"Week{week}_1", f"A{well + 1:02d}", "DMSO", 0.0, "DMSO", 1))
    for compound in range(9):
        for week in ((1,), (2,), (1, 2), (2, 3), (3,))[compound % 5]:
            rows.append((f"Week{week}_1", f"B{compound + 1:02d}", f"c{compound}", 1.0, "XXXYYYYYZ"[compound], 1))
    metadata = pd.DataFrame(rows, columns=[*EVALUATION_COLUMNS])
    features = rng.standard_normal((len(rows), 6)).astype(np.float32)
    ours = Ours({}).score(features, metadata)
    assert ours == pytest.approx(plain_scores(features, metadata), abs=1e-9)
    assert (9 * ours[0]) % 1 == pytest.approx(0, abs=1e-9)  # the lone compound is counted, as wrong


@pytest.mark.data
@pytest.mark.parametrize("num_cells", [24, 72, 400, 1000])
def test_cells_drawn_of_a_real_screen_can_be_scored_by_all(real_data, num_cells):
    """1,000 cells of 55 plates, some without a control: whichever are drawn, every batch has what TVN is fitted on."""
    index = pd.read_csv(real_data / "bbbc021" / "crops" / "index.csv", dtype={"plate": str})
    names = {"plate": "Metadata_Plate", "well": "Metadata_Well", "compound": "Metadata_Compound"}
    cells = index.rename(columns=names).assign(Replicate=1)
    drawn = cells.iloc[drawn_cells(cells, num_cells, 0, "real")].reset_index(drop=True)
    drawn["compound"] = drawn["Metadata_Compound"]
    metadata = drawn[[*EVALUATION_COLUMNS]]
    features = np.random.default_rng(0).standard_normal((len(metadata), 8)).astype(np.float32)
    assert Ours({}).score(features, metadata) == pytest.approx(plain_scores(features, metadata), abs=1e-9)
    assert score_features(features, metadata)["nsc"]["num_evaluated"] > 0


# A side's process


@pytest.mark.slow
def test_one_process_does_all_jobs_and_begins_anew_after_a_failure(cells):
    baseline = other_side(None, keep=True)
    job = {**cells.job(), "threads": 1, "repeats": 1, "dim": 4, "workers": 0, "batch_size": 8}
    first = baseline.begin(1)
    assert baseline.run("loss", **job)["cells"] == 8
    out_of_memory = baseline.run("loss", **{**job, "batch_size": 20_000}, allowed_bytes=2**31)
    assert "out_of_memory" in summary(out_of_memory)
    assert baseline.process is first
    assert "seconds" in baseline.run("loss", **job)  # the limit was that job's alone
    with pytest.raises(CellfastError, match=r"(?s)baseline: 'load' failed with status 1.*index\.csv"):
        baseline.run("load", **{**job, "index": "/nowhere/index.csv"})
    assert baseline.run("loss", timeout=0.0, **job) == {"timed_out": 0.0}
    assert "seconds" in baseline.run("loss", **job)
    second = baseline.process
    assert second is not first
    baseline.close()
    assert (second.returncode, baseline.process) == (0, None)
    baseline.keep = False
    assert baseline.run("loss", **job)["cells"] == 8
    assert baseline.process is None


def test_mistakes_are_told_before_anything_runs(screen, tmp_path):
    with pytest.raises(CellfastError, match=r"expected a checkout of .*found none"):
        other_side(tmp_path, None)
    with pytest.raises(CellfastError, match="--reference-python belongs to --reference-dir"):
        other_side(None, "python3")
    with pytest.raises(CellfastError, match="odd kernel"):
        check_reference_size(64)
    check_reference_size(96)
    with pytest.raises(CellfastError, match="40 cells do not fill a minibatch of 64"):
        measure_reference(
            screen=str(screen), sections=("parts",), settings=Settings(batch_size=64, size=SIZE), say=lambda text: None
        )
    run = CliRunner().invoke(cellfast, ["benchmark", "reference", "--out", "x.txt"])
    assert run.exit_code == 2
    assert ".json" in run.output


@pytest.mark.slow
def test_all_sections_beside_the_baseline(screen):
    tiny = Settings(
        batch_size=8, size=SIZE, threads=1, repeats=1, slow_repeats=1, score_cells=1_000, score_features=16, one_process=True
    )
    scaling = {
        "loaded": (40,),
        "scored": (300, 600),
        "extrapolated": (300, 10_000),
        "minibatches": (4, 8),
        "step_minibatches": (4,),
        "cores": (1,),
    }
    found = measure_reference(
        screen=str(screen),
        quick=True,
        settings=tiny,
        quality_settings=tiny,
        quality_steps=1,
        seeds=1,
        scaling=scaling,
        say=lambda text: None,
    )
    text = markdown(document(found, quick=False))
    assert {*found["parts"]} == {*PARTS} - {"score with pictures"}
    assert "| 10,000 | ~" in text
    assert "from 1 seed." in text
    assert "| cells/s by threads | side | 1 |" in text
    assert len(found["scaling"]["minibatch"]["loss"]["baseline"]) == 2

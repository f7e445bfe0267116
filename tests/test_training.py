"""Training and embedding: resuming is bit-identical, processes agree, model files carry what embedding needs, mistakes are told."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from screens import CROP, SMALL, STORE_CHANNELS, go, make_screen, torchrun, weights

from cellfast.cli import cellfast
from cellfast.errors import CellfastError
from cellfast.model_file import load_model
from cellfast.screens import Screen
from cellfast.screens.schema import METADATA_COLUMNS
from cellfast.training.config import TrainConfig, resolve_config
from cellfast.training.loop import train
from cellfast.training.validation import retrieval


@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": "adamw"},
        {"optimizer": "lars"},
        {"chunk_size": 5, "projection_batch_norm": True},
        pytest.param({"chunk_size": 5, "encoder": "resnet18"}, marks=pytest.mark.slow),
        {"feed": "resident", "chunk_size": 16},
    ],
    ids=lambda how: ",".join(map(str, how.values())),
)
def test_a_resumed_run_equals_one_that_never_stopped(screen, tmp_path, how, monkeypatch):
    values = {"steps": 8, "lr": 0.01, "checkpoint_every": 3, **how}
    go(screen, tmp_path / "straight", **values)
    from cellfast.training.loop import _Training

    # Stopped in the middle of an epoch, after the checkpoint of step 3 and some steps more.
    original, calls = _Training._save, []

    def save(self, step):
        original(self, step)
        calls.append(step)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Training, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        go(screen, tmp_path / "stopped", **values)
    monkeypatch.setattr(_Training, "_save", original)
    result = go(screen, tmp_path / "stopped", resume=True, **values)
    assert result.steps == 8
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_the_same_seed_gives_the_same_model_and_another_another(screen, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        go(screen, tmp_path / name, steps=3, seed=seed)
    a, b, c = (load_model(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_resident_cells_train_the_model_that_streamed_ones_do(screen, tmp_path):
    said: list[str] = []
    for feed in ("resident", "stream"):
        config = TrainConfig(**{**SMALL, "steps": 4, "feed": feed})
        train(screen, tmp_path / feed, config, say=said.append)
    assert load_model(tmp_path / "resident").digest == load_model(tmp_path / "stream").digest
    assert any(text.startswith("feed resident: as asked") for text in said)
    assert any(text == "feed stream: as asked" for text in said)


def test_options_for_a_gpu_are_refused_without_one(screen, tmp_path):
    with pytest.raises(CellfastError, match="cuda_graphs=True cannot be used: they need a GPU, and this runs on cpu"):
        go(screen, tmp_path / "run", steps=1, cuda_graphs=True)
    with pytest.raises(CellfastError, match="--feed resident is not possible: the dali loader streams"):
        go(screen, tmp_path / "run2", steps=1, feed="resident", loader="dali")


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_loss(screen, tmp_path):
    losses = [
        go(screen, tmp_path / f"{c}{k}", steps=3, compile=c, chunk_size=k).loss
        for c, k in ((False, None), (True, None), (True, 8))
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert losses[2] == pytest.approx(losses[0], abs=1e-3)


def test_no_steps_writes_a_random_model(screen, tmp_path):
    result = go(screen, tmp_path / "run", steps=0)
    loaded = load_model(result.model)
    assert loaded.metadata.step == 0
    assert loaded.channel_names == list(STORE_CHANNELS)
    assert (loaded.crop_size, loaded.output_size, loaded.metadata.bits) == (CROP, 16, 16)


@pytest.mark.parametrize("batch_norm", ["joint", "per-view"])
def test_a_resnet_trains_in_bfloat16_with_either_batch_norm(screen, tmp_path, batch_norm):
    result = go(screen, tmp_path / "run", steps=1, encoder="resnet18", amp=True, batch_norm=batch_norm, output_size=24)
    assert np.isfinite(result.loss)
    assert np.isfinite(result.validation["validation_loss"])


def test_a_loss_that_is_not_finite_stops_with_advice(screen, tmp_path):
    with pytest.raises(CellfastError, match=r"loss is nan at step .*smaller lr"):
        go(screen, tmp_path / "run", steps=20, lr=1e30, warmup=0.0, optimizer="adam")


def test_weights_that_are_not_finite_do_not_replace_the_last_checkpoint(screen, tmp_path, monkeypatch):
    from cellfast.training.checkpoint import load_checkpoint
    from cellfast.training.step import TrainingStep

    original, calls = TrainingStep.update, []

    def update(self, loss):
        original(self, loss)
        calls.append(1)
        if len(calls) == 2:
            next(self.module.parameters()).data.fill_(np.nan)

    monkeypatch.setattr(TrainingStep, "update", update)
    with pytest.raises(CellfastError, match=r"weights are not finite after step 2; the last good state is in .*last\.pt\. Try"):
        go(screen, tmp_path / "run", steps=4, checkpoint_every=1)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 1
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_resuming_with_another_model_or_optimizer_names_what_changed(screen, tmp_path):
    go(screen, tmp_path / "run", steps=1)
    with pytest.raises(CellfastError, match=r"encoder was cnn4, is resnet18; optimizer was adamw, is lars"):
        go(screen, tmp_path / "run", steps=2, resume=True, encoder="resnet18", optimizer="lars")


def test_force_keeps_the_earlier_run_when_the_new_one_cannot_begin(screen, tmp_path):
    go(screen, tmp_path / "run", steps=1)
    before = (tmp_path / "run" / "model.pt").read_bytes()
    with pytest.raises(CellfastError, match="absent"):
        go(screen, tmp_path / "run", steps=1, force=True, weights=str(tmp_path / "absent.pt"))
    assert (tmp_path / "run" / "model.pt").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_later(screen, tmp_path, number, monkeypatch):
    from cellfast.training.step import TrainingStep

    original, calls = TrainingStep.update, []

    def update(self, loss):
        original(self, loss)
        calls.append(1)
        if len(calls) == 3:
            # Twice at once, as from a terminal and from torchrun.
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainingStep, "update", update)
    stopped = go(screen, tmp_path / "run", steps=5)
    assert (stopped.interrupted, stopped.steps) == (True, 3)
    result = go(screen, tmp_path / "run", steps=5, resume=True)
    assert (result.interrupted, result.steps) == (False, 5)


def test_a_run_in_the_way_is_not_overwritten(screen, tmp_path):
    go(screen, tmp_path / "run", steps=0)
    with pytest.raises(CellfastError, match="resume=True continues it, force=True discards it"):
        go(screen, tmp_path / "run", steps=0)
    go(screen, tmp_path / "run", steps=0, force=True)


def test_mistakes_are_told(screen, tmp_path):
    with pytest.raises(CellfastError, match="fewer than one minibatch of 4096"):
        go(screen, tmp_path / "run", steps=1, batch_size=4096)
    with pytest.raises(CellfastError, match="did you mean lr"):
        resolve_config(overrides={"learning_rate": 1})
    with pytest.raises(CellfastError, match="temperature: expected a number"):
        TrainConfig(temperature="warm")
    with pytest.raises(CellfastError, match="no plate 'Week3_1'"):
        go(screen, tmp_path / "run", steps=1, plates=["Week3_1"])
    if not torch.cuda.is_available():
        with pytest.raises(CellfastError, match="device cuda was asked for"):
            go(screen, tmp_path / "run", steps=1, device="cuda")


def test_the_configuration_is_saved_and_repeats_the_run(screen, tmp_path):
    go(screen, tmp_path / "a", steps=2, lr=0.005)
    config = resolve_config(file=tmp_path / "a" / "config.yaml")
    assert config.lr == 0.005
    train(screen, tmp_path / "b", config, say=lambda text: None)
    assert load_model(tmp_path / "a").digest == load_model(tmp_path / "b").digest


def test_retrieval_counts_other_wells_only():
    h = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05], [0, 1.05]])
    hit, chance, queries = retrieval(h, np.array([0, 0, 1, 1, 0, 1]), np.array([0, 0, 1, 1, 2, 3]))
    assert (hit, queries) == (1.0, 6)
    assert chance == pytest.approx(np.mean([1 / 4, 1 / 4, 1 / 4, 1 / 4, 2 / 5, 2 / 5]))


@pytest.mark.parametrize("features", ["h", "z"])
def test_embeddings_are_the_models_features_in_store_order(screen, tmp_path, features):
    go(screen, tmp_path / "run", steps=1)
    runner = CliRunner()
    command = [
        "embed",
        str(screen),
        "--model",
        str(tmp_path / "run"),
        "-o",
        str(tmp_path / "e"),
        "--features",
        features,
        "--batch-size",
    ]
    result = runner.invoke(cellfast, [*command, "7"])
    assert result.exit_code == 0, result.output
    opened, loaded = Screen.open(screen), load_model(tmp_path / "run")
    from cellfast.augment import center_crop

    for store in opened.plates:
        table = pq.read_table(tmp_path / "e" / f"{store.plate}.parquet").to_pandas()
        assert list(table.columns[:11]) == list(METADATA_COLUMNS)
        x = center_crop(torch.from_numpy(np.array(store.crops())), loaded.low, loaded.high, 16)
        with torch.no_grad():
            expected = loaded.model(x)[0 if features == "h" else 1]
        np.testing.assert_allclose(table.iloc[:, 11:].to_numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
        assert table["Metadata_Well"].tolist() == store.metadata()["Metadata_Well"].tolist()
        assert (table.dtypes.iloc[11:] == np.float32).all()
    ledger = json.loads((tmp_path / "e" / "embeddings.json").read_text())
    assert ledger["cells"] == ledger["rows"] == 96
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "e").glob("*.parquet")}
    assert runner.invoke(cellfast, [*command, "96"]).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "e").glob("*.parquet")} == before
    go(screen, tmp_path / "other", steps=1, seed=5)
    command[3] = str(tmp_path / "other")
    refused = runner.invoke(cellfast, [*command, "96"])
    assert isinstance(refused.exception, CellfastError)
    assert "model was" in str(refused.exception)


def test_a_screen_that_does_not_fit_the_model_is_refused(screen, tmp_path):
    go(screen, tmp_path / "run", steps=0)
    other = make_screen(tmp_path / "other", channels=("DNA", "Actin", "Tubulin"))
    result = CliRunner().invoke(cellfast, ["embed", str(other), "--model", str(tmp_path / "run"), "-o", str(tmp_path / "e")])
    assert isinstance(result.exception, CellfastError)
    assert "the model has DNA, Tubulin, Actin, the screen has DNA, Actin, Tubulin" in str(result.exception)


def test_model_files_with_code_in_them_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"format": "cellfast-model", "x": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CellfastError, match="need to run code"):
        load_model(tmp_path / "model.pt")


@pytest.mark.slow
def test_torchrun_trains_over_two_processes(screen, tmp_path):
    options = "--encoder cnn4 --batch-size 16 --steps 4 --output-size 16 --device cpu --threads 1".split()
    done = torchrun("-m", "cellfast", "train", screen, "-o", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 process(es)" in done.stdout
    assert load_model(tmp_path / "run").metadata.step == 4

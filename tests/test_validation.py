"""Validation in pieces: the value of the whole minibatch, and no more cells in the encoder at once than a piece has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from screens import SMALL

from cellfast.augment import TwoViews
from cellfast.models import ModelConfig, build_model
from cellfast.screens import Screen
from cellfast.training import loop
from cellfast.training.config import TrainConfig
from cellfast.training.scaling import PlateScaling
from cellfast.training.validation import Validation


@pytest.fixture(scope="module")
def screen(screen):
    return Screen.open(screen)


def measure(screen, chunk_size, *, scaling="screen", cells=41, batch_size=20):
    two_views = TwoViews("default", 3, screen.crop_size, 16, memory_format=torch.channels_last)
    # The last minibatch has one cell: no loss, but features.
    validation = Validation(
        screen, np.arange(cells), two_views, PlateScaling(screen, scaling), batch_size=batch_size, temperature=0.1, most=100, seed=3,
        device=torch.device("cpu"), amp=False, chunk_size=chunk_size,
    )  # fmt: skip
    model = build_model(ModelConfig(encoder="resnet18", projection_dim=8), seed=0).train()
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    result = validation.measure(model)
    assert model.training
    return result, max(seen)


@pytest.mark.parametrize("scaling", ["screen", "plate"])
def test_pieces_give_the_value_of_the_whole_minibatch(screen, scaling):
    whole, most = measure(screen, None, scaling=scaling)
    assert most == 40
    assert whole.num_queries > 0
    for chunk_size in (1, 6, 20, 500):
        result, most = measure(screen, chunk_size, scaling=scaling)
        assert most <= 2 * chunk_size
        assert result.loss == pytest.approx(whole.loss, rel=1e-5)
        assert (result.retrieval, result.chance, result.num_queries) == (whole.retrieval, whole.chance, whole.num_queries)
    # The negatives are those of the whole minibatch: smaller minibatches would have another, easier task.
    smaller, _ = measure(screen, None, scaling=scaling, batch_size=6)
    assert abs(smaller.loss - whole.loss) > 0.1


def test_training_validates_in_the_pieces_it_trains_in(screen, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(loop, "Validation", lambda *a, **k: made.append(Validation(*a, **k)) or made[-1])
    values = {**SMALL, "steps": 2, "chunk_size": 4}
    result = loop.train(screen.path, tmp_path / "run", TrainConfig(**values), say=lambda text: None)
    assert np.isfinite(result.validation["validation_loss"])
    assert made[0].chunk_size == 4

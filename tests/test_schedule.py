"""Learning rates against torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from cellfast.training.schedule import learning_rate_factor


def test_the_recipe_of_the_reference_steps_a_cosine_after_the_tenth_epoch():
    steps_per_epoch, epochs = 7, 30
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps_per_epoch, eta_min=0)
    for epoch in range(1, epochs + 1):  # counted from one, as there
        rate = optimizer.param_groups[0]["lr"]
        for step in range(steps_per_epoch):
            factor = learning_rate_factor(
                (epoch - 1) * steps_per_epoch + step,
                total_steps=epochs * steps_per_epoch,
                steps_per_epoch=steps_per_epoch,
                schedule="perakis2021",
            )
            assert factor == pytest.approx(rate, abs=1e-12)
        optimizer.step()
        if epoch >= 10:
            scheduler.step()


def test_warm_up_then_cosine():
    factors = [
        learning_rate_factor(s, total_steps=10, steps_per_epoch=5, schedule="cosine", warmup=0.2, final=0.1) for s in range(10)
    ]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2] == 1.0
    assert factors[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))

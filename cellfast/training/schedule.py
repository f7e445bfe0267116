"""The learning rate as a function of the step: nothing to save, nothing to get out of step on resuming."""

from __future__ import annotations

import math


def learning_rate_factor(
    step: int, *, total_steps: int, steps_per_epoch: int, schedule: str, warmup: float = 0.0, final: float = 0.0
) -> float:
    """The learning rate of step 0, 1, …, ``total_steps`` − 1 as a fraction of its peak.

    With w = round(warmup · total_steps): (step + 1) / w while step < w, then by ``schedule``: ``constant`` 1; ``cosine``
    final + (1 − final) · (1 + cos(π t)) / 2 with t = (step − w) / (total_steps − w); ``perakis2021`` by epoch e = step // steps_per_epoch
    (the first is 0), without warm-up: (1 + cos(π · max(0, e − 9) / steps_per_epoch)) / 2.

    Source: Chen et al. 2020 for warm-up and cosine; the last is what the public implementation of Perakis et al. does, which steps its
    scheduler at the end of every epoch from the tenth on, with a half period counted in minibatches (it rises again where an epoch has
    few minibatches).
    """
    if schedule == "perakis2021":
        epoch = step // max(1, steps_per_epoch)
        return 0.5 * (1 + math.cos(math.pi * max(0, epoch - 9) / max(1, steps_per_epoch)))
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"schedule must be cosine, constant or perakis2021, got {schedule!r}")

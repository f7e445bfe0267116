"""What `cellfast benchmark reference` measures: its sections, the table of parts, and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SECTIONS = ("parts", "agreement", "quality", "scaling")
SCORES = ("nsc", "nscb")
# With fewer seeds nothing is said about which side's features are better.
LEAST_SEEDS = 5


@dataclass(frozen=True)
class Part:
    """A part of the way from crops to accuracy, measured on every side.

    Attributes:
        what: in words.
        slow: timed in rounds, in each of which every side is timed once, so that a drift of the machine meets all of them.
        long: one round fewer.
        warm_up: calls before the clock starts.
        table: the simulated table it takes instead of the cells: ``features`` or ``treatments``.
        agree: results in which the sides must agree, or their times would not be of the same work; ``tolerance``: how closely.
        reference_only: not compared with the baseline, which has no such part.
    """

    what: str
    slow: bool = False
    long: bool = False
    warm_up: int = 1
    table: str | None = None
    agree: tuple[str, ...] = ()
    tolerance: float = 1e-9
    reference_only: bool = False


PARTS: dict[str, Part] = {
    "load": Part("crops on disk until every cell was read once", warm_up=0),
    "augment": Part("two views of every cell, minibatch by minibatch, from loaded crops", slow=True),
    "loss": Part("NT-Xent, forward and backward, rows normalised inside", agree=("loss", "gradient_norm"), tolerance=1e-5),
    "step": Part("forward, NT-Xent, backward, Adam on ready views", slow=True),
    "epoch": Part("one pass: minibatches, views, training steps", slow=True, long=True, warm_up=0),
    "embed": Part("features of every cell", slow=True, warm_up=0),
    "score": Part(
        "cells' features to NSC and NSCB: well means, TVN, treatment medians, neighbours", table="features", agree=SCORES
    ),
    "score with pictures": Part(
        "the same and a t-SNE, its pictures by MoA and the confusion between MoAs",
        slow=True, long=True, warm_up=0, table="features", agree=SCORES, reference_only=True,
    ),
    "evaluate": Part(
        "treatments' profiles to NSC and NSCB: neighbours of another compound, and batch", table="treatments", agree=SCORES
    ),
    "end to end": Part("crops on disk to NSC and NSCB: load, train, embed, score", slow=True, long=True, warm_up=0),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Sizes and repeats of a comparison.

    Attributes:
        encoder, batch_size, size, dim: a ResNet's name, cells per minibatch, side in px, columns of the projection.
        threads: CPU threads of each side; the reference's loader gets as many worker processes.
        repeats: timings of each part, in one process; slow_repeats: rounds of a slow part.
        score_cells, score_features: the table of features that is scored.
        epochs: passes over the cells in the part from crops to accuracy.
        one_process: all that is measured of a side in one process, which is quicker and less exact about memory.
    """

    encoder: str = "resnet18"
    batch_size: int = 256
    size: int = 96
    dim: int = 256
    threads: int = 2
    repeats: int = 5
    slow_repeats: int = 3
    score_cells: int = 10_000
    score_features: int = 512
    epochs: int = 1
    one_process: bool = False

    def job(self) -> dict[str, Any]:
        """What a job of `worker` must know about them."""
        return {
            "encoder": self.encoder, "batch_size": self.batch_size, "dim": self.dim, "workers": self.threads, "threads": self.threads,
            "epochs": self.epochs,
        }  # fmt: skip


QUICK = Settings(batch_size=24, size=56, repeats=1, slow_repeats=1, score_cells=1_000, score_features=64, one_process=True)

"""What a training run is: every value with its default, limits and help; recipes; YAML and command-line overrides. Imports no
torch."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from cellfast.atomic import write_text
from cellfast.declared import check, value
from cellfast.errors import CellfastError, option
from cellfast.printable import masked_values

# As in cellfast.models, which imports torch; a test compares them.
ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "cnn4")
STEMS = ("imagenet", "small", "dense", "full")
INPUT_TRANSFORMS = ("none", "perakis2021")
# Bytes and levels of a YAML file: the longest configuration has three levels and a few thousand bytes.
MOST_YAML, MOST_YAML_DEPTH = 1 << 20, 20


@dataclass
class TrainConfig:
    """Every value of a training run; each is a YAML key and a command-line option of its own name (``batch_size`` →
    ``--batch-size``).

    Raises:
        CellfastError: a value of the wrong type or outside its range, naming key, limits and what was given.
    """

    recipe: str = value("default", "Set of defaults to start from.", group="Recipe")

    encoder: str = value("resnet18", "Encoder.", choices=ENCODERS, group="Model")
    stem: str = value(
        "small",
        "First layers of a ResNet. imagenet: 7x7 stride 2 + pooling; small: 3x3 stride 2 + pooling, same cost; dense: no "
        "pooling, 4x the cost; full: stride 1, 16x. cnn4 has no choice of stem.",
        choices=STEMS,
        group="Model",
    )
    projection_dim: int = value(128, "Columns of the projection z.", minimum=1, group="Model")
    projection_layers: int = value(2, "Linear layers of the projection head.", minimum=1, group="Model")
    projection_hidden: int | None = value(
        None, "Width of the head's hidden layers; null: as wide as h.", minimum=1, group="Model"
    )
    projection_batch_norm: bool = value(False, "BatchNorm in the projection head.", group="Model")
    input_transform: str = value(
        "none",
        "What the model does to its input. perakis2021: inverted and normalised as by the reference implementation.",
        choices=INPUT_TRANSFORMS,
        group="Model",
    )
    weights: str | None = value(
        None, "Start from this file: a torchvision ResNet's state_dict (also ImageNet's) or a cellfast model.", group="Model"
    )

    output_size: int | None = value(
        None,
        "Side in px of the views the encoder sees; null: 6/7 of the crop size, to a multiple of 8 (112 -> 96).",
        minimum=16,
        group="Input",
    )
    scaling: str = value(
        "screen",
        "Intensity scaling: the medians over plates (screen), each plate's own (plate), or 8-bit crops as they are and others as "
        "screen (8-bit).",
        choices=("screen", "plate", "8-bit"),
        group="Input",
    )
    augment: dict[str, Any] = value(  # noqa: RUF009
        {"preset": "default"}, "Augmentation preset; single values as augment.NAME.", group="Input"
    )
    plates: list[str] = value([], "Train on these plates only (comma-separated); none given: all.", group="Input")  # noqa: RUF009
    hold_out_plates: list[str] = value([], "Leave these plates out of training and validation.", group="Input")  # noqa: RUF009
    loader: str = value("mmap", "Who gathers the cells.", choices=("mmap", "dali"), group="Input")
    feed: str = value(
        "auto",
        "Where the cells wait: all of them in the device's memory (resident), or read as they are due (stream); auto: resident "
        "on a GPU where they take at most half of its free memory.",
        choices=("auto", "resident", "stream"),
        group="Input",
    )

    temperature: float = value(0.1, "Temperature of NT-Xent.", minimum=0.01, group="Loss")
    batch_norm: str = value(
        "joint",
        "BatchNorm statistics over both views (joint), or one forward pass per view as the reference implementation (per-view).",
        choices=("joint", "per-view"),
        group="Loss",
    )

    batch_size: int = value(256, "Cells per minibatch over all processes; each gives two views.", minimum=2, group="Optimisation")
    chunk_size: int | None = value(
        None,
        "Encode a minibatch in pieces of so many cells per process (gradient caching): the loss still sees all of it, memory is "
        "that of one piece, time about 4/3. BatchNorm statistics are each piece's. null: in one piece.",
        minimum=1,
        group="Optimisation",
    )
    epochs: int = value(100, "Passes over the training cells.", minimum=0, group="Optimisation")
    steps: int | None = value(
        None,
        "Minibatches in all, instead of epochs; 0 writes the model as it starts: random (the baseline), or with weights.",
        minimum=0,
        group="Optimisation",
    )
    optimizer: str = value("adamw", "Optimiser.", choices=("adamw", "adam", "lars"), group="Optimisation")
    lr: float = value(1e-3, "Peak learning rate (not scaled by the minibatch).", above=0, group="Optimisation")
    weight_decay: float = value(
        1e-4,
        "Weight decay (adam: L2 as torch.optim.Adam; adamw and lars: not on biases and BatchNorm).",
        minimum=0,
        group="Optimisation",
    )
    momentum: float = value(0.9, "Momentum of LARS.", minimum=0, maximum=1, group="Optimisation")
    schedule: str = value(
        "cosine",
        "Learning rate after the warm-up: cosine or constant per step; perakis2021: constant for 10 epochs, then a cosine per "
        "epoch whose half period is as many epochs as an epoch has minibatches.",
        choices=("cosine", "constant", "perakis2021"),
        group="Optimisation",
    )
    warmup: float = value(
        0.05, "Fraction of all steps in which the learning rate rises.", minimum=0, maximum=1, group="Optimisation"
    )
    final_lr: float = value(
        0.0, "Learning rate at the end, as a fraction of the peak.", minimum=0, maximum=1, group="Optimisation"
    )
    clip_grad_norm: float | None = value(None, "Clip the gradient's norm to this.", above=0, group="Optimisation")

    validation: str = value(
        "well",
        "What is held out for validation: whole wells, random cells, or nothing.",
        choices=("well", "random", "none"),
        group="Validation",
    )
    validation_fraction: float = value(0.05, "Fraction of wells or cells held out.", above=0, maximum=0.9, group="Validation")
    validation_cells: int = value(
        2048, "At most so many held-out cells are used in each validation.", minimum=2, group="Validation"
    )
    validate_every: int = value(
        1, "Epochs between validations; the last step is always validated.", minimum=1, group="Validation"
    )

    seed: int = value(0, "Seed of weights, order, views and held-out cells.", minimum=0, maximum=999_999_999, group="Running")
    device: str = value(
        "auto", "Where to compute; auto: CUDA where there is a GPU.", choices=("auto", "cpu", "cuda"), group="Running"
    )
    amp: bool = value(False, "bfloat16 autocast.", group="Running")
    compile: bool = value(False, "torch.compile the model.", group="Running")
    cuda_graphs: bool = value(
        False,
        "Record forward and backward once and replay them (CUDA, one process, no chunk_size): for small minibatches, where "
        "launching kernels takes longer than running them.",
        group="Running",
    )
    threads: int | None = value(None, "CPU threads; null: torch's choice.", minimum=1, group="Running")
    checkpoint_every: int = value(
        500, "Steps between checkpoints; one is also written after every epoch.", minimum=1, group="Running"
    )
    log_every: int = value(10, "Steps between lines of metrics.jsonl and TensorBoard.", minimum=1, group="Running")

    def __post_init__(self) -> None:
        if isinstance(self.augment, str):
            self.augment = {"preset": self.augment}
        check(self)
        self.augment = {"preset": "default", **self.augment}
        if self.recipe not in RECIPES:
            raise CellfastError(f"recipe: {self.recipe!r} is not known: choose one of {', '.join(RECIPES)}")

    def to_dict(self) -> dict[str, Any]:
        """All values as plain YAML values, in the order of the declaration."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all values as YAML, atomically; `resolve_config` with this file gives the same configuration."""
        text = yaml.safe_dump(masked_values(self.to_dict()), sort_keys=False, allow_unicode=True, default_flow_style=False)
        write_text(path, "# Every value of this run: cellfast train SCREEN -o RUN --config THIS_FILE repeats it.\n" + text)


# perakis2021: the public implementation's last configuration, with its inverted and normalised input. Deviations: views as
# cellfast.augment's preset says; ImageNet weights are not downloaded (give the file with --weights). Same crops, views and
# weights give the same losses: tests/test_reference.py.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "perakis2021": {
        "encoder": "resnet50",
        "stem": "imagenet",
        "projection_dim": 256,
        "input_transform": "perakis2021",
        "scaling": "8-bit",
        "augment": {"preset": "perakis2021", "inverted": True},
        "temperature": 0.1,
        "batch_norm": "per-view",
        "batch_size": 256,
        "epochs": 600,
        "optimizer": "adam",
        "lr": 3e-4,
        "weight_decay": 1e-5,
        "schedule": "perakis2021",
        "warmup": 0.0,
        "validation": "random",
        "validation_fraction": 0.05,
    },
    # About two minutes on two CPU cores on the screen of `cellfast demo`: a small encoder, and stronger blur and per-channel gain
    # than the default's, because that screen's plates and weeks differ in focus and brightness.
    "demo": {
        "encoder": "cnn4",
        "batch_size": 128,
        "epochs": 8,
        "lr": 4e-3,
        "augment": {"preset": "default", "blur_p": 0.5, "blur_sigma_px": [0.1, 1.5], "channel_gain": 0.5},
        "validation_cells": 256,
        "validate_every": 3,
    },
}


# What other programs call these.
_SYNONYMS = {
    "learning_rate": "lr", "tau": "temperature", "wd": "weight_decay", "batch": "batch_size", "model": "encoder",
    "arch": "encoder", "backbone": "encoder", "bf16": "amp", "num_threads": "threads", "augmentation": "augment",
    "out_dim": "projection_dim",
}  # fmt: skip


def check_keys(keys: typing.Iterable[str], where: str) -> None:
    """Raise `CellfastError` naming the nearest known key for every key that does not exist."""
    known = [entry.name for entry in fields(TrainConfig)]
    problems = []
    for key in keys:
        if key not in known:
            near = [_SYNONYMS[key]] if key in _SYNONYMS else difflib.get_close_matches(str(key), known, n=3, cutoff=0.6)
            problems.append(f"{key!r}" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    if problems:
        raise CellfastError(
            f"{where}: unknown {'key' if len(problems) == 1 else 'keys'} {', '.join(problems)}. Known: {', '.join(known)}"
        )


def _yaml(text: str) -> Any:
    """The value of a YAML text whose nesting is that of a configuration, and in which nothing stands for a copy of something
    else.

    Raises:
        CellfastError: anything else, or not YAML.
    """
    depth = 0
    try:
        # Events come one by one, whatever the depth; making values of them does not.
        for event in yaml.parse(text, yaml.SafeLoader):
            where = f"line {event.start_mark.line + 1}" if event.start_mark else "the configuration"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_YAML_DEPTH:
                raise CellfastError(f"{where}: nested more than {MOST_YAML_DEPTH} deep")
            if isinstance(event, yaml.AliasEvent):
                raise CellfastError(f"{where}: aliases (*name) are not read: write the value itself")
        return yaml.safe_load(text)
    except CellfastError:
        raise
    except Exception as error:  # YAML's own, and those of the numbers and dates it makes
        raise CellfastError(" ".join(str(error).split())[:300]) from error


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a YAML file; unknown keys and anything but a mapping raise `CellfastError`."""
    path = Path(path)
    if not path.is_file():
        raise CellfastError(f"the configuration {path} does not exist or is not a file")
    if path.stat().st_size > MOST_YAML:
        raise CellfastError(f"{path} has {path.stat().st_size:,} bytes: expected a configuration, of at most {MOST_YAML:,}")
    try:
        values = _yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CellfastError(f"{path} is not valid YAML: {error}") from error
    except CellfastError as error:
        raise CellfastError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CellfastError(f"{path} must hold `key: value` lines, found {type(values).__name__}")
    check_keys(values, str(path))
    return values


def parse_assignment(text: str) -> tuple[str, Any]:
    """``key=value`` of ``--set`` as a key and a YAML value, e.g. ``lr=3e-4``, ``augment.rotation_deg=90``, ``plates=[A, B]``."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise CellfastError(f"{option('set', text)}: expected key=value, e.g. {option('set', 'lr=3e-4')}")
    try:
        return key.strip(), _yaml(value)
    except CellfastError as error:
        raise CellfastError(f"{option('set', text[:200])}: the value is not valid YAML: {error}") from error


def resolve_config(
    recipe: str | None = None, file: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The configuration of a run: defaults, then the recipe, then the YAML file, then ``overrides`` (``augment.NAME`` sets one
    value).

    Raises:
        CellfastError: unknown keys (with the nearest known ones), values out of range, or contradicting recipes or durations.
    """
    from_file = read_config_file(file) if file else {}
    overrides = dict(overrides or {})
    if "recipe" in overrides:
        recipe = overrides.pop("recipe")
    if recipe and "recipe" in from_file and from_file["recipe"] != recipe:
        raise CellfastError(
            f"{option('recipe', recipe)} contradicts {file}, whose recipe is {from_file['recipe']}: give one of them"
        )
    name = recipe or from_file.get("recipe", "default")
    if not isinstance(name, str) or name not in RECIPES:
        raise CellfastError(f"recipe: {name!r} is not known: choose one of {', '.join(RECIPES)}")
    if overrides.get("epochs") is not None and overrides.get("steps") is not None:
        raise CellfastError(
            f"epochs ({overrides['epochs']}) and steps ({overrides['steps']}) both say how long to train: give one"
        )
    values: dict[str, Any] = {**RECIPES[name], **from_file, "recipe": name}
    augment = values.get("augment", {})
    augment = _augment_values(augment, str(file))
    single = {key: overrides.pop(key) for key in list(overrides) if key.startswith("augment.")}
    if "augment" in overrides:
        given = overrides.pop("augment")
        # Another preset starts anew: single values of the old one would be a mixture nobody asked for.
        augment = _augment_values(given, "configuration")
    augment |= {key.removeprefix("augment."): one for key, one in single.items()}
    check_keys(overrides, "configuration")
    values.update(overrides)
    if augment:
        values["augment"] = augment
    # The one that was said last decides: steps of a file or recipe end where the command line says epochs.
    if "epochs" in overrides:
        values["steps"] = None
    return TrainConfig(**values)


def _augment_values(given: Any, where: str) -> dict[str, Any]:
    if isinstance(given, str):
        return {"preset": given}
    if given is not None and (not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given)):
        raise CellfastError(
            f"{where}: augment: expected the name of a preset, or a mapping of names to values, got {given!r:.200}"
        )
    return dict(given or {})


def automatic_output_size(crop_size: int) -> int:
    """Side of the views for crops of ``crop_size`` px: 6/7 of it to the nearest multiple of 8, at least 16 (112 → 96, 96 → 80,
    56 → 48)."""
    return min(crop_size, max(16, 8 * round(crop_size * 6 / 7 / 8)))

"""The file that carries a model and everything embedding needs: ``RUN/model.pt``."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellfast import __version__
from cellfast.atomic import atomic_path
from cellfast.bounded import check_claim
from cellfast.errors import CellfastError, option
from cellfast.metadata.names import check_text
from cellfast.models import ModelConfig, SimCLR, adapt_input_channels
from cellfast.printable import Shown, printable
from cellfast.tensor_file import load_tensors, write_tensors

FORMAT = "cellfast-model"
FORMAT_VERSION = 1
SCALINGS = ("screen", "plate")
MOST_CROP_PX = 1 << 14


@dataclass
class ModelMetadata:
    """What a model must know about the images it was trained on.

    Args:
        channel_names: the channels in the order of the model's input.
        crop_size: side of the stored crops in px.
        output_size: side in px of what the encoder sees, cut from the crop's centre.
        bits: bits per stored pixel, 8 or 16.
        scaling: ``screen`` (every plate uses ``low`` and ``high``) or ``plate`` (each plate uses its own, stored with its crops).
        low: pixel value that becomes 0, per channel.
        high: pixel value that becomes 1, per channel.
        training_data: digest of the screen the model was trained on (`cellfast.training.split.data_digest`); empty: not trained.
        step: optimiser steps taken.
        cellfast_version: the version that trained it; empty: unknown.
        git_commit: the commit of the source checkout that trained it; empty: an installed package.
        extra: anything else worth keeping, plain values only.

    Raises:
        CellfastError: values that contradict each other or lie outside their range.
    """

    channel_names: list[str]
    crop_size: int
    output_size: int
    bits: int
    scaling: str
    low: list[float]
    high: list[float]
    training_data: str = ""
    step: int = 0
    cellfast_version: str = __version__
    git_commit: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        channels = len(self.channel_names)
        if not channels or not all(isinstance(name, str) for name in self.channel_names):
            raise CellfastError(f"channel_names must be the names of one channel or more, got {self.channel_names!r}")
        for name in self.channel_names:
            check_text("channel", name)
        if self.bits not in (8, 16):
            raise CellfastError(f"bits must be 8 or 16, got {self.bits!r}")
        if len(self.low) != channels or len(self.high) != channels:
            raise CellfastError(
                f"low and high must have one value per channel ({channels}), got {len(self.low)} and {len(self.high)}"
            )
        if self.scaling not in SCALINGS:
            raise CellfastError(f"scaling {self.scaling!r} is not known: choose one of {', '.join(SCALINGS)}")
        if not all(math.isfinite(high - low) and low <= high for low, high in zip(self.low, self.high)):
            raise CellfastError(
                f"the intensity scaling needs finite low <= high for every channel, got low {self.low}, high {self.high}"
            )
        whole = all(isinstance(value, int) for value in (self.output_size, self.crop_size, self.step))
        if not whole or not 1 <= self.output_size <= self.crop_size <= MOST_CROP_PX:
            raise CellfastError(
                f"output_size must be between 1 and the crop size, that at most {MOST_CROP_PX} px, and step a whole number; got "
                f"{self.output_size!r}, {self.crop_size!r} and {self.step!r}"
            )
        if not all(isinstance(text, str) for text in (self.training_data, self.cellfast_version, self.git_commit)):
            raise CellfastError("training_data, cellfast_version and git_commit must be text")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelMetadata:
        """The metadata of a file, of this version or another of the same format.

        What an older file lacks is unknown, not this version's own; what a newer file adds plays no part in embedding (such a
        change would be a new format version) and is left out.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{"cellfast_version": "", **{name: value for name, value in values.items() if name in known}})


@dataclass(repr=False)
class LoadedModel(Shown):
    """A model from a file, on its device in evaluation mode, with what it was trained for."""

    model: SimCLR
    metadata: ModelMetadata
    path: Path
    digest: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return format_description(self.describe())

    @property
    def channel_names(self) -> list[str]:
        return self.metadata.channel_names

    @property
    def output_size(self) -> int:
        return self.metadata.output_size

    @property
    def crop_size(self) -> int:
        return self.metadata.crop_size

    @property
    def scaling(self) -> str:
        return self.metadata.scaling

    @property
    def low(self) -> Tensor:
        """Pixel value that becomes 0, float32 [C]."""
        return torch.tensor(self.metadata.low, dtype=torch.float32)

    @property
    def high(self) -> Tensor:
        """Pixel value that becomes 1, float32 [C]."""
        return torch.tensor(self.metadata.high, dtype=torch.float32)

    def describe(self) -> dict[str, Any]:
        """What the file says of itself, as plain JSON-able values: what the model takes, and where it comes from."""
        meta = self.metadata
        return {
            "path": str(self.path),
            "digest": self.digest,
            "encoder": self.model.config.to_dict(),
            "num_features": self.model.num_features,
            "step": meta.step,
            "channels": [
                {"name": name, "low": float(low), "high": float(high)}
                for name, low, high in zip(meta.channel_names, meta.low, meta.high)
            ],
            "scaling": meta.scaling,
            "crop_size_px": meta.crop_size,
            "output_size_px": meta.output_size,
            "dtype": f"uint{meta.bits}",
            "training_data": meta.training_data or None,
            "cellfast_version": meta.cellfast_version or None,
            "git_commit": meta.git_commit or None,
        }

    def check_screen(self, name: str, channel_names: list[str], crop_size: int, bits: int) -> None:
        """Raise `CellfastError`, naming both sides, unless a screen's crops are what the model was trained on.

        Equivalent to comparing channel names with their order, crop size in px and bits per pixel.
        """
        found = {"channels": ", ".join(channel_names), "crop size": f"{crop_size} px", "pixels": f"{bits}-bit"}
        wanted = {
            "channels": ", ".join(self.channel_names),
            "crop size": f"{self.crop_size} px",
            "pixels": f"{self.metadata.bits}-bit",
        }
        wrong = [
            f"{key}: the model has {wanted[key]}, the screen has {found[key]}" for key in wanted if wanted[key] != found[key]
        ]
        if wrong:
            reordered = channel_names != self.channel_names and sorted(channel_names) == sorted(self.channel_names)
            raise CellfastError(
                f"the model {self.path} does not fit the screen {name}: "
                f"{'; '.join(wrong)}{' (the same channels in another order)' if reordered else ''}. Ingest the screen with the "
                "model's channels and crop size, or train a model on this screen"
            )


def format_description(description: Mapping[str, Any]) -> str:
    """`LoadedModel.describe` as lines for a terminal."""
    d, encoder = description, description["encoder"]
    lines = [
        f"model        {d['path']}",
        f"encoder      {encoder['encoder']}, stem {encoder['stem']}, {d['num_features']} features; {d['step']:,} steps",
        f"crops        {d['crop_size_px']} × {d['crop_size_px']} px, {d['dtype']}; the encoder sees the central "
        f"{d['output_size_px']} × {d['output_size_px']} px",
        f"scaling      {'the plate’s own' if d['scaling'] == 'plate' else 'fixed'}",
    ]
    lines += [
        f"channel {i}    {c['name']}" + ("" if d["scaling"] == "plate" else f"  {c['low']:g} – {c['high']:g} → 0 – 1")
        for i, c in enumerate(d["channels"])
    ]
    lines += [
        f"digest       {d['digest']}",
        f"trained on   {d['training_data'] or 'nothing, or unknown'}",
        f"made by      cellfast {d['cellfast_version'] or 'of an unknown version'}"
        + (f", commit {d['git_commit']}" if d["git_commit"] else ""),
    ]
    return "\n".join(map(printable, lines))


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state_dict, as hexadecimal text; independent of the file's packing."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(path: str | os.PathLike[str], model: SimCLR, metadata: ModelMetadata) -> str:
    """Write a model and its metadata to ``path``, atomically, and return its digest (of weights, architecture and metadata)."""
    _check_channels(model.config, metadata)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    values = {key: value for key, value in vars(metadata).items()}
    digest = _model_digest(state, model.config, metadata)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": model.config.to_dict(),
        "metadata": values,
        "digest": digest,
        "state": state,
    }
    with atomic_path(path) as temporary:
        write_tensors(temporary, content)
    return digest


def load_model(path_or_run: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedModel:
    """The model of a run folder (its ``model.pt``) or of a model file, on ``device``, in evaluation mode.

    Nothing in the file is executed: equivalent to ``torch.load(path, weights_only=True)`` and ``load_state_dict`` with strict
    keys.

    Raises:
        CellfastError: no such file, not a model file, damaged (any byte of it was changed), or written by a newer version.
    """
    path = Path(path_or_run)
    if path.is_dir():
        run, path = path, path / "model.pt"
        if not path.exists():
            raise CellfastError(
                f"{run} has no model.pt: it is not the folder of a finished training run (cellfast train SCREEN -o {run}). "
                f"An interrupted run writes it at the next validation or with {option('resume', True)}"
            )
    if not path.exists():
        raise CellfastError(f"the model {path} does not exist: give a run folder of cellfast train, or its model.pt")
    content = load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CellfastError(
            f"{path} is not a cellfast model: expected a file written by cellfast train. Weights of other origin go into a "
            f"training with {option('weights')}"
        )
    if not isinstance(content.get("format_version"), int):
        raise CellfastError(f"the model {path} is damaged: it names no format version")
    if content["format_version"] > FORMAT_VERSION:
        raise CellfastError(
            f"{path} has model format {content['format_version']}, this cellfast ({__version__}) reads up to "
            f"{FORMAT_VERSION}: upgrade cellfast"
        )
    try:
        config = ModelConfig.from_dict(content["config"])
        metadata = ModelMetadata.from_dict(content["metadata"])
        _check_channels(config, metadata)
        _check_size(config, content["state"], path)
        model = SimCLR(config)
        model.load_state_dict(content["state"])
        digest = _model_digest(content["state"], config, metadata)
    except CellfastError as error:
        raise CellfastError(f"the model {path} cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CellfastError(f"the model {path} is damaged: {error}") from error
    if content.get("digest") != digest:
        raise CellfastError(f"the model {path} is damaged: its content does not match the digest it was written with")
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    return LoadedModel(model, metadata, path, content["digest"])


def _check_size(config: ModelConfig, state: Mapping[str, Tensor], path: Path) -> None:
    """Before an encoder is made: the file must hold the tensors of so large a one."""
    held = path.stat().st_size
    if config.projection_layers > len(state) or not isinstance(state, Mapping):
        raise ValueError(f"{config.projection_layers:,} layers in the projection head, and {len(state)} tensors")
    with torch.device("meta"):
        wanted = SimCLR(config).state_dict()
    check_claim(path, "its model", sum(v.numel() * v.element_size() for v in wanted.values()), held)
    for name, value in wanted.items():
        found = state.get(name)
        if not isinstance(found, Tensor) or found.shape != value.shape or found.layout != torch.strided:
            raise ValueError(f"{name}: expected a tensor {list(value.shape)}, found {list(getattr(found, 'shape', ()))}")


def _check_channels(config: ModelConfig, metadata: ModelMetadata) -> None:
    if config.num_channels != len(metadata.channel_names):
        raise CellfastError(
            f"the encoder takes {config.num_channels} channels, but the model names {len(metadata.channel_names)} "
            f"({', '.join(metadata.channel_names)})"
        )


def _model_digest(state: Mapping[str, Tensor], config: ModelConfig, metadata: ModelMetadata) -> str:
    """Weights, architecture and what the input is made from: what decides an embedding, and nothing else."""
    inputs = [metadata.channel_names, metadata.crop_size, metadata.output_size, metadata.bits, metadata.scaling]
    text = repr([sorted(config.to_dict().items()), inputs, list(map(float, metadata.low)), list(map(float, metadata.high))])
    return hashlib.sha256((state_digest(state) + text).encode()).hexdigest()


@dataclass(frozen=True)
class WeightsReport:
    """What was taken from a weights file: names loaded, names of the file left unused, names of the model left at their random
    start."""

    loaded: list[str]
    unused: list[str]
    fresh: list[str]
    adapted: str = ""

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded"
        if self.adapted:
            text += f"; {self.adapted}"
        if self.unused:
            text += f"; not used: {_shorten(self.unused)}"
        if self.fresh:
            text += f"; left at their random start: {_shorten(self.fresh)}"
        return text


def load_weights(model: SimCLR, path: str | os.PathLike[str]) -> WeightsReport:
    """Start ``model`` from a file: a cellfast model, or a state_dict of a torchvision ResNet (ImageNet weights among them).

    The whole encoder must be there with fitting shapes. A classifier (``fc.*``) is not used; a projection head is taken where
    all of it fits.
    A first convolution for another number of input channels is adapted by `adapt_input_channels`: each channel gets the mean
    filter, scaled by
    K / C. Prefixes ``module.``, ``encoder.`` and ``backbone.`` are removed.

    Raises:
        CellfastError: an encoder tensor missing or of another shape, all of them listed; the model is left unchanged.
    """
    path = Path(path)
    content = load_tensors(path)
    for key in ("state", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CellfastError(
            f"{path} holds no tensors by name: expected a state_dict of a torchvision ResNet, or a cellfast model"
        )
    given = {_plain_name(str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in given.items():
        check_claim(path, f"its tensor {name[:80]}", tensor.numel() * tensor.element_size(), path.stat().st_size)
    encoder = model.encoder.state_dict()
    problems, new, adapted = [], {}, ""
    for name, target in encoder.items():
        value = given.get(name)
        if value is None:
            # Old state_dicts lack the counters of BatchNorm; they play no part in the result.
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{name}: missing, expected {list(target.shape)}")
            continue
        if name == _first_convolution(model.encoder) and value.ndim == 4 and value.shape[1] != target.shape[1]:
            before, after = value.shape[1], target.shape[1]
            adapted = f"{name} adapted from {before} to {after} channels (mean filter × {before}/{after})"
            value = adapt_input_channels(value, target.shape[1])
        if value.shape != target.shape:
            problems.append(f"{name}: expected {list(target.shape)}, found {list(value.shape)}")
            continue
        new[name] = value
    if problems:
        hint = ""
        convolution = given.get("conv1.weight")
        if convolution is not None and convolution.ndim == 4 and convolution.shape[-1] == 7 and model.config.stem != "imagenet":
            hint = f". The file's first convolution is 7×7: use {option('stem', 'imagenet')}"
        if not new and (prefixes := _prefixes(given, encoder)):
            shown = _shorten([f"'{printable(prefix)}' ({count} tensors)" for prefix, count in prefixes])
            raise CellfastError(
                f"the weights {path}: no tensor has a name of the encoder {model.config.encoder} (expected {next(iter(encoder))} "
                f"and so on); the names in the file begin with {shown}. Of prefixes only {', '.join(map(repr, _PREFIXES))} are "
                "removed: save the file again without the others, with the tensors of one encoder only"
            )
        raise CellfastError(
            f"the weights {path} do not fit the encoder {model.config.encoder} with stem {model.config.stem}: "
            f"{_shorten(problems, 8, '; ')}{hint}"
        )
    head = {name: value for name, value in given.items() if name.startswith("projection.")}
    target_head = {f"projection.{name}": value for name, value in model.projection.state_dict().items()}
    head_fits = head.keys() == target_head.keys() and all(head[name].shape == target_head[name].shape for name in head)
    with torch.no_grad():
        model.encoder.load_state_dict({**encoder, **new})
        if head_fits:
            model.projection.load_state_dict({name.removeprefix("projection."): value for name, value in head.items()})
    loaded = sorted(new) + (sorted(head) if head_fits else [])
    unused = sorted(set(given) - set(loaded))
    return WeightsReport(loaded, unused, [] if head_fits else sorted(target_head), adapted)


_PREFIXES = ("module.", "encoder.", "backbone.")


def _plain_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _prefixes(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """What stands before the wanted names in the names of a file, or where they do not occur, what these begin with; most
    frequent first."""
    found: Counter[str] = Counter()
    for name in given:
        # The longest wanted name that this one ends with: layer1.0.conv1.weight ends with conv1.weight too.
        parts = name.split(".")
        ends = [i for i in range(1, len(parts)) if ".".join(parts[i:]) in wanted]
        if ends:
            found[".".join(parts[: ends[0]]) + "."] += 1
    if not found:
        found.update(name.partition(".")[0] + "." for name in given if "." in name)
    return found.most_common()


def _first_convolution(encoder: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d))


def _shorten(items: list[str], most: int = 4, separator: str = ", ") -> str:
    rest = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + rest

"""Writes a model as one file that other programs run: raw crops in, features out, with scaling and centre crop inside.

Three formats, the same program in each: TorchScript (libtorch, C++), pt2 (``torch.export``) and ONNX.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellfast import __version__
from cellfast.atomic import atomic_path
from cellfast.augment import center_crop
from cellfast.bounded import check_claim, check_torch_file
from cellfast.errors import CellfastError, option
from cellfast.export.formats import FORMATS, METADATA_NAME, Program, quiet, require_onnx
from cellfast.model_file import LoadedModel
from cellfast.screens import Screen

METADATA_VERSION = 1
# Bytes of the metadata, most of them names of features.
MOST_METADATA = 16 << 20
# In the order of SimCLR.forward.
FEATURES = ("h", "z")
# Of the largest feature of a cell: float32 in another order of operations differs by about 1e-6.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportSummary:
    """What was written, and how far its features lie from the Python model's.

    ``largest_relative`` is the largest over the cells of max |exported − model| / max |model|.
    """

    path: Path
    format: str
    num_features: int
    num_bytes: int
    cells_checked: int
    checked_on: str
    largest_absolute: float
    largest_relative: float


def export_model(
    model: LoadedModel,
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    features: str = "h",
    batch_size: int | None = None,
    check: Screen | None = None,
    check_cells: int = 64,
    force: bool = False,
    seed: int = 0,
) -> ExportSummary:
    """Write ``model`` as a program that takes crops as stored and gives features, and compare it with the Python model.

    Equivalent to ``encode(center_crop(crops, low, high, output_size))``. Input ``crops``: uint8 or uint16 [B, C, S, S] as the
    model's pixels are (TorchScript also takes the same values as int32 or float32); with scaling ``plate`` also ``low`` and
    ``high``, float32 [C]. Output ``features``: float32 [B, F]. The file is read back and run on crops before it gets its name.

    Args:
        model: from `cellfast.load_model`, on the CPU.
        out: the file.
        format: one of `FORMATS`; None: by the file's suffix.
        features: ``h`` or ``z``.
        batch_size: crops per call; None: any number.
        check: a screen whose crops to compare on, spread evenly over its cells; None: random crops within the model's scaling.
        check_cells: how many crops to compare on.
        force: replace ``out``.
        seed: of the random crops.

    Raises:
        CellfastError: format and suffix do not fit, the file exists, packages are missing, the screen does not fit the model, or
            the features differ by more than `TOLERANCE` (relative); no file is left then.
    """
    path = Path(out)
    format = check_target(path, format, model.path, force=force)
    if features not in FEATURES:
        raise CellfastError(f"features must be h or z, got {features!r}")
    if batch_size is not None and batch_size < 1:
        raise CellfastError(f"the batch size must be at least 1, or dynamic, got {batch_size}")
    if check_cells < 1:
        raise CellfastError(f"the number of crops to check on must be at least 1, got {check_cells}")
    if format == "onnx":
        require_onnx()
    network = model.model.eval()
    num_features = network.num_features if features == "h" else network.config.projection_dim
    samples = _random_samples(model, check_cells, seed) if check is None else _screen_samples(model, check, check_cells)
    metadata = export_metadata(model, format, features, num_features, batch_size)
    with atomic_path(path) as temporary:
        with quiet():
            FORMATS[format].write(model, features, batch_size, metadata, temporary)
            exported = load_exported(temporary)
            absolute, relative = _compare(exported, model, features, samples)
        if not relative <= TOLERANCE:
            raise CellfastError(
                f"the exported model's features differ from the Python model's by {relative:.2g} of their size ({absolute:.2g}), "
                f"more than {TOLERANCE:g}; {path} was not written. Try another {option('format')}, and please report this"
            )
        size = temporary.stat().st_size
    cells = sum(len(crops) for crops, _, _ in samples)
    where = "random crops" if check is None else f"crops of {check.path}"
    return ExportSummary(path, format, num_features, size, cells, where, absolute, relative)


def check_target(path: Path, format: str | None, source: Path, *, force: bool) -> str:
    """The format to write, from ``format`` or the suffix; `CellfastError` when they disagree or the file is in the way."""
    known = "; ".join(f"{name}: {', '.join(kind.suffixes)}" for name, kind in FORMATS.items())
    if format is None:
        format = next((name for name, kind in FORMATS.items() if path.suffix in kind.suffixes), None)
        if format is None:
            raise CellfastError(
                f"{path}: the suffix {path.suffix!r} names no format ({known}); choose one, or give {option('format')}"
            )
    if format not in FORMATS:
        raise CellfastError(f"format {format!r} is not known: choose one of {', '.join(FORMATS)}")
    suffixes = FORMATS[format].suffixes
    if path.suffix not in suffixes:
        raise CellfastError(
            f"{path}: a file of format {format} is named {' or '.join('*' + s for s in suffixes)}, not *{path.suffix}"
        )
    if path.exists() and path.resolve() == source.resolve():
        raise CellfastError(f"{path} is the model itself: choose another name for the exported file")
    if path.is_dir():
        raise CellfastError(f"{path} is a folder: expected the name of a file to write")
    if path.exists() and not force:
        raise CellfastError(f"{path} exists: choose another name, or use {option('force', True)} to replace it")
    return format


def export_metadata(model: LoadedModel, format: str, features: str, num_features: int, batch_size: int | None) -> dict[str, Any]:
    """What is stored in the file under `METADATA_NAME`: what goes in, what comes out, and where the model comes from."""
    meta = model.metadata
    size, channels, pixels = meta.crop_size, len(meta.channel_names), f"uint{meta.bits}"
    inputs = [{"name": "crops", "dtype": pixels, "shape": [batch_size or "batch", channels, size, size]}]
    if meta.scaling == "plate":
        inputs += [{"name": name, "dtype": "float32", "shape": [channels]} for name in ("low", "high")]
    return {
        "cellfast_export": METADATA_VERSION,
        "format": format,
        "inputs": inputs,
        "output": {"name": "features", "dtype": "float32", "shape": [batch_size or "batch", num_features]},
        "channels": list(meta.channel_names),
        "crop_size": size,
        "output_size": meta.output_size,
        "pixels": pixels,
        "scaling": meta.scaling,
        "low": None if meta.scaling == "plate" else list(map(float, meta.low)),
        "high": None if meta.scaling == "plate" else list(map(float, meta.high)),
        "features": features,
        "feature_names": _feature_names(features, num_features),
        "model": {"digest": model.digest, "config": model.model.config.to_dict(), "step": meta.step},
        "training_data": meta.training_data or None,
        "trained_with": {"cellfast_version": meta.cellfast_version, "git_commit": meta.git_commit or None},
        "exported_with": {"cellfast_version": __version__, "torch_version": torch.__version__},
    }


def _feature_names(features: str, count: int) -> list[str]:
    # The columns of cellfast embed.
    digits = max(3, len(str(count - 1)))
    return [f"{features}{i:0{digits}d}" for i in range(count)]


def read_export_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata in an exported file of any format.

    Raises:
        CellfastError: not a file written by ``cellfast export``.
    """
    path = Path(path)
    if not path.is_file():
        raise CellfastError(f"{path} does not exist or is not a file: expected a file written by cellfast export")
    try:
        if path.suffix == ".onnx":
            require_onnx()
            import onnx

            text = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}[METADATA_NAME]
        else:
            # Both are zip archives that keep extra files in a folder of their own; nothing but that text is read.
            check_torch_file(path)
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_NAME}"))
                check_claim(path, METADATA_NAME, archive.getinfo(name).file_size, MOST_METADATA)
                text = archive.read(name).decode()
        metadata = json.loads(text)
        if not isinstance(metadata, dict) or metadata.get("format") not in FORMATS:
            raise CellfastError(f"{path} is damaged: its {METADATA_NAME} names none of the formats {', '.join(FORMATS)}")
        return metadata
    except CellfastError:
        raise
    except Exception as error:  # torch and onnx raise many kinds for files that are not theirs
        raise CellfastError(f"{path} is not a file written by cellfast export: it carries no {METADATA_NAME}") from error


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a TorchScript or pt2 file was written by ``cellfast export`` (a model.pt was not)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"/extra/{METADATA_NAME}") for name in archive.namelist())
    except Exception:  # a damaged archive raises many kinds; whoever reads it tells
        return False


class ExportedModel:
    """An exported file, loaded: ``features = exported(crops)``, or ``exported(crops, low, high)`` with scaling per plate.

    Attributes:
        path: the file.
        metadata: what `export_metadata` put into it.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], program: Program, device: torch.device) -> None:
        self.path, self.metadata, self.program, self.device = path, metadata, program, device

    @property
    def takes_scaling(self) -> bool:
        """Whether low and high are inputs (scaling per plate)."""
        return len(self.metadata["inputs"]) > 1

    @torch.inference_mode()
    def __call__(self, crops: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        """Features float32 [B, F] of crops as stored, uint8 or uint16 [B, C, S, S]; low, high: float32 [C], of the plate.

        A program of a fixed minibatch gets full ones: the last is filled up, and cut off again.

        Raises:
            CellfastError: low and high missing, or given to a program that has its own.
        """
        if self.takes_scaling != (low is not None and high is not None) or (low is None) != (high is None):
            raise CellfastError(
                f"{self.path}: this model is scaled "
                f"{'per plate: give low and high' if self.takes_scaling else 'inside: low and high are not its inputs'}"
            )
        scaling = () if low is None or high is None else (low.to(self.device), high.to(self.device))
        fixed, count = self.metadata["inputs"][0]["shape"][0], len(crops)
        crops = crops.to(self.device)
        if not isinstance(fixed, int):
            return self.program(crops, *scaling)
        filled = torch.cat([crops, crops[:1].expand(-count % fixed, -1, -1, -1)])
        return torch.cat([self.program(part.contiguous(), *scaling) for part in filled.split(fixed)])[:count]


def load_exported(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> ExportedModel:
    """Load a file of `export_model`, of any format.

    TorchScript and pt2 files are programs: load only files you trust.

    Raises:
        CellfastError: not a file written by ``cellfast export``, or its packages are missing.
    """
    path, device = Path(path), torch.device(device)
    metadata = read_export_metadata(path)
    with quiet():
        return ExportedModel(path, metadata, FORMATS[metadata["format"]].load(path, device), device)


@torch.inference_mode()
def _compare(
    exported: ExportedModel, model: LoadedModel, features: str, samples: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[float, float]:
    """(largest absolute, largest relative) difference of a written program from the Python model; crops go in singly and
    together."""
    absolute = relative = 0.0
    for crops, low, high in samples:
        x = center_crop(crops, low, high, model.output_size, memory_format=torch.channels_last)
        expected = model.model(x)[FEATURES.index(features)].float()
        if not bool(torch.isfinite(expected).all()):
            raise CellfastError(f"the model {model.path} gives features that are not finite: it cannot be exported")
        scaling = (low, high) if exported.takes_scaling else ()
        found = torch.cat([exported(part, *scaling) for part in (crops[:1], crops[1:]) if len(part)])
        if found.shape != expected.shape or found.dtype != torch.float32 or not bool(torch.isfinite(found).all()):
            return float("inf"), float("inf")
        difference = (found - expected).abs().amax(dim=1)
        size = expected.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        absolute, relative = max(absolute, float(difference.max())), max(relative, float((difference / size).max()))
    return absolute, relative


def _random_samples(model: LoadedModel, count: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Crops of values from a little below ``low`` to a little above ``high`` (wider ones would be clamped to 0 and 1 throughout);
    the last of several spans the whole range of the pixel type."""
    meta = model.metadata
    low, high = np.asarray(meta.low, dtype=float), np.asarray(meta.high, dtype=float)
    margin = np.maximum(0.1 * (high - low), 1.0)
    random = np.random.default_rng(seed).random((count, len(low), meta.crop_size, meta.crop_size))
    values = (low - margin)[:, None, None] + random * (high - low + 2 * margin)[:, None, None]
    dtype = np.uint8 if meta.bits == 8 else np.uint16
    crops = values.round().clip(0, np.iinfo(dtype).max).astype(dtype)
    if count > 1:
        crops[-1] = np.random.default_rng(seed + 1).integers(0, np.iinfo(dtype).max, crops[-1].shape, dtype, endpoint=True)
    return [(torch.from_numpy(crops), model.low, model.high)]


def _screen_samples(model: LoadedModel, screen: Screen, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Crops spread evenly over the screen's cells, by plate, with each plate's scaling."""
    model.check_screen(str(screen.path), screen.channel_names, screen.crop_size, 8 * np.dtype(screen.dtype).itemsize)
    if screen.num_cells == 0:
        raise CellfastError(f"{screen.path} holds no cells to check on: give another screen, or leave out {option('check')}")
    rows = np.unique(np.linspace(0, screen.num_cells - 1, min(count, screen.num_cells)).round().astype(np.int64))
    samples = []
    for number, store in enumerate(screen.plates):
        first, last = screen.offsets[number], screen.offsets[number + 1]
        mine = rows[(rows >= first) & (rows < last)] - first
        if len(mine):
            low, high = (store.scale_low, store.scale_high) if model.scaling == "plate" else (model.low, model.high)
            scaling = (torch.as_tensor(low, dtype=torch.float32), torch.as_tensor(high, dtype=torch.float32))
            samples.append((torch.from_numpy(np.concatenate([store.read(row, row + 1) for row in mine.tolist()])), *scaling))
    return samples

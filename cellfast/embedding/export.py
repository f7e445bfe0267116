"""Writes a model as one file that other programs run: raw crops in, features out, with scaling and centre crop inside.

Three formats, the same program in each: TorchScript (libtorch, C++), pt2 (``torch.export``) and ONNX.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellfast import __version__
from cellfast.atomic import atomic_path
from cellfast.embedding.embed_store import FEATURES, CropEncoder, feature_names
from cellfast.errors import CellfastError
from cellfast.model_file import LoadedModel
from cellfast.models import SimCLR
from cellfast.screens import Screen

# Format → the suffixes its files may have; the first is the usual one.
FORMATS: dict[str, tuple[str, ...]] = {
    "torchscript": (".ts", ".torchscript", ".pt"),
    "pt2": (".pt2",),
    "onnx": (".onnx",),
}
METADATA_NAME = "cellfast.json"
METADATA_VERSION = 1
TOLERANCE = 1e-4
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# Runs a program: (crops, low, high) → features; low and high are used by programs with scaling per plate.
Runner = Callable[[Tensor, Tensor, Tensor], Tensor]


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


class _Network(nn.Module):
    """Views → the one output that is exported."""

    def __init__(self, model: SimCLR, features: str) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.head = model.projection if features == "z" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class _Program(nn.Module):
    """What the exported programs share. Only what TorchScript can compile; its plain attributes are read by the C++ example."""

    def __init__(self, network: nn.Module, model: LoadedModel, features: str, names: list[str], batch_size: int | None) -> None:
        super().__init__()
        meta = model.metadata
        self.network = network
        self.channel_names: list[str] = list(meta.channel_names)
        self.feature_names: list[str] = names
        self.num_channels: int = len(meta.channel_names)
        self.crop_size: int = meta.crop_size
        self.output_size: int = meta.output_size
        # The window of augment.center_crop: the stored centroid pixel S//2 lands on s//2.
        self.start: int = meta.crop_size // 2 - meta.output_size // 2
        self.bits: int = meta.bits
        self.scaling: str = meta.scaling
        self.batch_size: int = batch_size or 0

    def check(self, crops: Tensor) -> None:
        # Inside the program: a crop of another size would otherwise be cut off centre without a word.
        if (
            crops.dim() != 4
            or crops.size(1) != self.num_channels
            or crops.size(2) != self.crop_size
            or crops.size(3) != self.crop_size
        ):
            raise ValueError(
                f"crops must have shape [B, {self.num_channels}, {self.crop_size}, {self.crop_size}], got {crops.size()}"
            )
        if self.batch_size > 0 and crops.size(0) != self.batch_size:
            raise ValueError(f"this program was exported for {self.batch_size} crops at a time, got {crops.size(0)}")
        stored = crops.dtype == torch.uint8 if self.bits == 8 else crops.dtype == torch.uint16
        if not stored and crops.dtype != torch.int32 and crops.dtype != torch.float32:
            raise ValueError(f"crops must be uint{self.bits}, or the same pixel values as int32 or float32")

    def embed(self, crops: Tensor, low: Tensor, inverse: Tensor) -> Tensor:
        stop = self.start + self.output_size
        window = crops[:, :, self.start : stop, self.start : stop].to(torch.float32)
        x = ((window - low.view(-1, 1, 1)) * inverse.view(-1, 1, 1)).clamp(0.0, 1.0)
        return self.network(x.contiguous(memory_format=torch.channels_last))


class _ScreenScaled(_Program):
    """(crops) → features; the model's own low and high are inside."""

    def __init__(self, network: nn.Module, model: LoadedModel, features: str, names: list[str], batch_size: int | None) -> None:
        super().__init__(network, model, features, names, batch_size)
        self.register_buffer("low", model.low)
        self.register_buffer("inverse", 1.0 / (model.high - model.low).clamp_min(1.0))

    def forward(self, crops: Tensor) -> Tensor:
        self.check(crops)
        return self.embed(crops, self.low, self.inverse)


class _PlateScaled(_Program):
    """(crops, low, high) → features; low and high are the plate's, float32 [C]."""

    def forward(self, crops: Tensor, low: Tensor, high: Tensor) -> Tensor:
        self.check(crops)
        if low.dim() != 1 or high.dim() != 1 or low.size(0) != self.num_channels or high.size(0) != self.num_channels:
            raise ValueError(f"low and high must have shape [{self.num_channels}], got {low.size()} and {high.size()}")
        return self.embed(crops, low, 1.0 / (high - low).clamp_min(1.0))


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
        _require_onnx()
    encoder = CropEncoder(model, features=features, device=torch.device("cpu"))
    samples = _random_samples(model, check_cells, seed) if check is None else _screen_samples(model, encoder, check, check_cells)
    metadata = export_metadata(model, format, features, encoder.num_features, batch_size)
    write, run = {
        "torchscript": (_write_torchscript, _run_torchscript),
        "pt2": (_write_pt2, _run_pt2),
        "onnx": (_write_onnx, _run_onnx),
    }[format]
    with atomic_path(path) as temporary:
        with _quiet():
            write(model, features, batch_size, metadata, temporary)
            absolute, relative = _compare(run(temporary), encoder, samples, batch_size)
        if relative > TOLERANCE:
            raise CellfastError(
                f"the exported model's features differ from the Python model's by {relative:.2g} of their size "
                f"({absolute:.2g}), more than {TOLERANCE:g}; {path} was not written. Try another --format, and please report this"
            )
        size = temporary.stat().st_size
    cells = sum(len(crops) for crops, _, _ in samples)
    where = "random crops" if check is None else f"crops of {check.path}"
    return ExportSummary(path, format, encoder.num_features, size, cells, where, absolute, relative)


def check_target(path: Path, format: str | None, source: Path, *, force: bool) -> str:
    """The format to write, from ``format`` or the suffix; `CellfastError` when they disagree or the file is in the way."""
    known = "; ".join(f"{name}: {', '.join(suffixes)}" for name, suffixes in FORMATS.items())
    if format is None:
        format = next((name for name, suffixes in FORMATS.items() if path.suffix in suffixes), None)
        if format is None:
            raise CellfastError(f"{path}: the suffix {path.suffix!r} names no format ({known}); choose one, or give --format")
    if format not in FORMATS:
        raise CellfastError(f"format {format!r} is not known: choose one of {', '.join(FORMATS)}")
    if path.suffix not in FORMATS[format]:
        raise CellfastError(
            f"{path}: a file of format {format} is named {' or '.join('*' + s for s in FORMATS[format])}, not *{path.suffix}"
        )
    if path.exists() and path.resolve() == source.resolve():
        raise CellfastError(f"{path} is the model itself: choose another name for the exported file")
    if path.is_dir():
        raise CellfastError(f"{path} is a folder: expected the name of a file to write")
    if path.exists() and not force:
        raise CellfastError(f"{path} exists: choose another name, or use --force to replace it")
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
        "feature_names": feature_names(features, num_features),
        "model": {"digest": model.digest, "config": model.model.config.to_dict(), "step": meta.step},
        "training_data": meta.training_data or None,
        "trained_with": {"cellfast_version": meta.cellfast_version, "git_commit": meta.git_commit or None},
        "exported_with": {"cellfast_version": __version__, "torch_version": torch.__version__},
    }


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
            _require_onnx()
            import onnx

            text = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}[METADATA_NAME]
        else:
            # Both are zip archives that keep extra files in a folder of their own; nothing but that text is read.
            reader = torch._C.PyTorchFileReader(str(path))
            name = next(record for record in reader.get_all_records() if record in (f"extra/{METADATA_NAME}", METADATA_NAME))
            text = reader.get_record(name).decode()
        return json.loads(text)
    except CellfastError:
        raise
    except Exception as error:  # torch and onnx raise many kinds for files that are not theirs
        raise CellfastError(f"{path} is not a file written by cellfast export: it carries no {METADATA_NAME}") from error


def _program(model: LoadedModel, features: str, batch_size: int | None, metadata: dict[str, Any], network: nn.Module) -> _Program:
    kind = _PlateScaled if model.scaling == "plate" else _ScreenScaled
    return kind(network, model, features, metadata["feature_names"], batch_size).eval()


def _example(model: LoadedModel, batch_size: int | None) -> tuple[Tensor, ...]:
    meta = model.metadata
    # Two crops: torch.export takes a size of one for a constant.
    shape = (batch_size or 2, len(meta.channel_names), meta.crop_size, meta.crop_size)
    crops = torch.zeros(shape, dtype=torch.uint8 if meta.bits == 8 else torch.uint16)
    return (crops, model.low, model.high) if meta.scaling == "plate" else (crops,)


def _write_torchscript(model: LoadedModel, features: str, batch_size: int | None, metadata: dict[str, Any], path: Path) -> None:
    meta = model.metadata
    views = torch.zeros(2, len(meta.channel_names), meta.output_size, meta.output_size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        # The network is traced (torchvision's code need not compile), the program around it is compiled, with its checks.
        network = torch.jit.trace(_Network(model.model, features).eval(), views, check_trace=False)
        scripted = torch.jit.script(_program(model, features, batch_size, metadata, network))
    scripted.save(str(path), _extra_files={METADATA_NAME: json.dumps(metadata, ensure_ascii=False)})


def _run_torchscript(path: Path) -> Runner:
    program = torch.jit.load(str(path), map_location="cpu")
    return lambda crops, *scaling: program(crops, *scaling[: _num_inputs(path) - 1])


def _exported(
    model: LoadedModel, features: str, batch_size: int | None, metadata: dict[str, Any]
) -> tuple[_Program, tuple[Tensor, ...], tuple[dict[int, Any] | None, ...]]:
    """A contiguous copy of the program, example inputs, and which of their sizes may change."""
    network = copy.deepcopy(_Network(model.model, features)).to(memory_format=torch.contiguous_format).eval()
    inputs = _example(model, batch_size)
    sizes: list[dict[int, Any] | None] = [None] * len(inputs)
    if batch_size is None:
        sizes[0] = {0: torch.export.Dim.DYNAMIC}
    return _program(model, features, batch_size, metadata, network), inputs, tuple(sizes)


def _write_pt2(model: LoadedModel, features: str, batch_size: int | None, metadata: dict[str, Any], path: Path) -> None:
    program, inputs, sizes = _exported(model, features, batch_size, metadata)
    with torch.no_grad():
        exported = torch.export.export(program, inputs, dynamic_shapes=sizes)
    torch.export.save(exported, path, extra_files={METADATA_NAME: json.dumps(metadata, ensure_ascii=False)})


def _run_pt2(path: Path) -> Runner:
    program = torch.export.load(path).module()
    return lambda crops, *scaling: program(crops, *scaling[: _num_inputs(path) - 1])


def _write_onnx(model: LoadedModel, features: str, batch_size: int | None, metadata: dict[str, Any], path: Path) -> None:
    import onnx

    program, inputs, sizes = _exported(model, features, batch_size, metadata)
    if batch_size is None:
        sizes = ({0: "batch"}, *sizes[1:])
    with torch.no_grad():
        proto = torch.onnx.export(
            program, inputs, dynamo=True, dynamic_shapes=sizes, input_names=[i["name"] for i in metadata["inputs"]],
            output_names=["features"], external_data=False, verbose=False,
        ).model_proto  # fmt: skip
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_NAME, json.dumps(metadata, ensure_ascii=False)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _run_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(crops: Tensor, *scaling: Tensor) -> Tensor:
        values = [value.numpy() for value in (crops, *scaling)]
        return torch.from_numpy(session.run(None, dict(zip(names, values)))[0])

    return run


def _num_inputs(path: Path) -> int:
    return len(read_export_metadata(path)["inputs"])


def _compare(
    run: Runner, encoder: CropEncoder, samples: list[tuple[Tensor, Tensor, Tensor]], batch_size: int | None
) -> tuple[float, float]:
    """(largest absolute, largest relative) difference; crops go in singly and together where the program takes any number."""
    absolute = relative = 0.0
    for crops, low, high in samples:
        expected = encoder(crops, low, high)
        if not bool(torch.isfinite(expected).all()):
            raise CellfastError(f"the model {encoder.loaded.path} gives features that are not finite: it cannot be exported")
        with torch.inference_mode():
            if batch_size is None:
                parts = [run(crops[:1], low, high), *([run(crops[1:], low, high)] if len(crops) > 1 else [])]
            else:
                # The last minibatch is filled up: the program takes exactly batch_size.
                filled = torch.cat([crops, crops[:1].expand(-len(crops) % batch_size, -1, -1, -1)])
                parts = [run(part, low, high) for part in filled.split(batch_size)]
        found = torch.cat(parts)[: len(crops)]
        if found.shape != expected.shape or found.dtype != torch.float32 or not bool(torch.isfinite(found).all()):
            return float("inf"), float("inf")
        difference = (found - expected).abs().amax(dim=1)
        size = expected.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        absolute, relative = max(absolute, float(difference.max())), max(relative, float((difference / size).max()))
    return absolute, relative


def _random_samples(model: LoadedModel, count: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Crops of values from a little below ``low`` to a little above ``high``: wider ones would be clamped to 0 and 1 throughout."""
    meta = model.metadata
    low, high = np.asarray(meta.low, dtype=float), np.asarray(meta.high, dtype=float)
    margin = np.maximum(0.1 * (high - low), 1.0)
    random = np.random.default_rng(seed).random((count, len(low), meta.crop_size, meta.crop_size))
    values = (low - margin)[:, None, None] + random * (high - low + 2 * margin)[:, None, None]
    dtype = np.uint8 if meta.bits == 8 else np.uint16
    return [(torch.from_numpy(values.round().clip(0, np.iinfo(dtype).max).astype(dtype)), model.low, model.high)]


def _screen_samples(model: LoadedModel, encoder: CropEncoder, screen: Screen, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Crops spread evenly over the screen's cells, by plate, with each plate's scaling."""
    model.check_screen(str(screen.path), screen.channel_names, screen.crop_size, 8 * np.dtype(screen.dtype).itemsize)
    if screen.num_cells == 0:
        raise CellfastError(f"{screen.path} holds no cells to check on: give another screen, or leave out --check")
    rows = np.unique(np.linspace(0, screen.num_cells - 1, min(count, screen.num_cells)).round().astype(np.int64))
    samples = []
    for number, store in enumerate(screen.plates):
        first, last = screen.offsets[number], screen.offsets[number + 1]
        mine = rows[(rows >= first) & (rows < last)] - first
        if len(mine):
            samples.append((torch.from_numpy(np.array(store.crops()[mine])), *encoder.scaling_of(store)))
    return samples


def _require_onnx() -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CellfastError(
            f"ONNX needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}, not installed here: "
            "pip install 'cellfast[onnx]'"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own remarks: TorchScript's deprecation, notes on operators that are not used here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)

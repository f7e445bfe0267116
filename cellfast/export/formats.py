"""The programs that are exported, and how each format writes and runs them: raw crops in, features out."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellfast.errors import CellfastError
from cellfast.model_file import LoadedModel
from cellfast.models import SimCLR

METADATA_NAME = "cellfast.json"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# Crops (and, with scaling per plate, low and high) → features.
Program = Callable[..., Tensor]


class _Network(nn.Module):
    """Views → the one output that is exported."""

    def __init__(self, model: SimCLR, features: str) -> None:
        super().__init__()
        self.transform, self.encoder = model.input_transform, model.encoder
        self.head = model.projection if features == "z" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.transform(x)))


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
        return self.embed(crops, self.low, self.inverse)  # type: ignore[arg-type]


class _PlateScaled(_Program):
    """(crops, low, high) → features; low and high are the plate's, float32 [C]."""

    def forward(self, crops: Tensor, low: Tensor, high: Tensor) -> Tensor:
        self.check(crops)
        if low.dim() != 1 or high.dim() != 1 or low.size(0) != self.num_channels or high.size(0) != self.num_channels:
            raise ValueError(f"low and high must have shape [{self.num_channels}], got {low.size()} and {high.size()}")
        return self.embed(crops, low, 1.0 / (high - low).clamp_min(1.0))


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


def _load_torchscript(path: Path, device: torch.device) -> Program:
    return torch.jit.load(str(path), map_location=device).eval()


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


def _load_pt2(path: Path, device: torch.device) -> Program:
    return torch.export.load(path).module().to(device)


def _write_onnx(model: LoadedModel, features: str, batch_size: int | None, metadata: dict[str, Any], path: Path) -> None:
    require_onnx()
    import onnx

    program, inputs, sizes = _exported(model, features, batch_size, metadata)
    if batch_size is None:
        sizes = ({0: "batch"}, *sizes[1:])
    with torch.no_grad():
        exported = torch.onnx.export(
            program, inputs, dynamo=True, dynamic_shapes=sizes, input_names=[i["name"] for i in metadata["inputs"]],
            output_names=["features"], external_data=False, verbose=False,
        )  # fmt: skip
    assert exported is not None
    proto = exported.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_NAME, json.dumps(metadata, ensure_ascii=False)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _load_onnx(path: Path, device: torch.device) -> Program:
    require_onnx()
    import onnxruntime

    if device.type != "cpu":
        raise CellfastError(f"{path}: ONNX files are run on the CPU here, not on {device}")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        values = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, values)[0])

    return run


@dataclass(frozen=True)
class Format:
    """How files of a format are named (the first suffix is the usual one), written and loaded."""

    suffixes: tuple[str, ...]
    write: Callable[[LoadedModel, str, int | None, dict[str, Any], Path], None]
    load: Callable[[Path, torch.device], Program]


FORMATS: dict[str, Format] = {
    "torchscript": Format((".ts", ".torchscript", ".pt"), _write_torchscript, _load_torchscript),
    "pt2": Format((".pt2",), _write_pt2, _load_pt2),
    "onnx": Format((".onnx",), _write_onnx, _load_onnx),
}


def require_onnx() -> None:
    """Raise `CellfastError` naming the packages of the extra ``cellfast[onnx]`` that are not installed, and the command that
    installs them."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CellfastError(
            f"ONNX needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}, not installed here: pip install "
            "'cellfast[onnx]'"
        )


@contextmanager
def quiet() -> Iterator[None]:
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

"""Exported models: every format gives the Python model's features, carries what it takes, and is not written when it disagrees."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from screens import write_crops

import cellfast.export.exported as export_module
from cellfast.cli import cellfast
from cellfast.errors import CellfastError
from cellfast.export import export_model, load_exported, read_export_metadata
from cellfast.model_file import ModelMetadata, load_model, save_model
from cellfast.models import ModelConfig, build_model
from cellfast.screens import Screen

CHANNELS, SIZE, OUTPUT = ["DNA", "Tubulin", "Actin"], 25, 16
PLATES = {"P1": 21, "P2": 13}
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cpp"
SUFFIX = {"torchscript": "ts", "pt2": "pt2", "onnx": "onnx"}
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
FORMATS = [
    "torchscript",
    "pt2",
    pytest.param("onnx", marks=pytest.mark.skipif(not HAS_ONNX, reason="needs the extra cellfast[onnx]")),
]


def make_screen(folder: Path, dtype: type = np.uint16, channels: list[str] = CHANNELS) -> Path:
    """Two plates of different brightness; 16-bit pixels go beyond 32,767, which a signed type would turn negative."""
    rng = np.random.default_rng(1)
    for number, (plate, cells) in enumerate(PLATES.items()):
        top = np.iinfo(dtype).max // (1 + number)
        crops = rng.integers(0, top, (cells, len(channels), SIZE, SIZE)).astype(dtype)
        write_crops(folder, plate, [(crops, {})], channels=channels)
    return folder


def make_model(
    path: Path, *, bits: int = 16, scaling: str = "screen", channels: list[str] = CHANNELS, transform: str = "none"
) -> Path:
    top = 2.0**bits - 1
    metadata = ModelMetadata(
        channel_names=channels, crop_size=SIZE, output_size=OUTPUT, bits=bits, scaling=scaling,
        low=[0.05 * top, 0.1 * top, 0.0], high=[0.9 * top, 0.5 * top, 0.8 * top], training_data="ab" * 32, step=7,
    )  # fmt: skip
    config = ModelConfig(encoder="cnn4", num_channels=len(channels), projection_dim=5, input_transform=transform)
    save_model(path, build_model(config, 3), metadata)
    return path


def oracle(path: Path, crops: np.ndarray, low: np.ndarray, high: np.ndarray, features: str = "h") -> np.ndarray:
    """Scaling and window written out in NumPy, then the network."""
    low, high = (np.asarray(value, dtype=np.float64)[:, None, None] for value in (low, high))
    start = SIZE // 2 - OUTPUT // 2
    window = crops[:, :, start : start + OUTPUT, start : start + OUTPUT].astype(np.float64)
    x = torch.from_numpy(np.clip((window - low) / (high - low), 0, 1).astype(np.float32))
    with torch.no_grad():
        h, z = load_model(path).model(x)
    return (h if features == "h" else z).numpy()


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Path:
    return make_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model.pt")


def export(*arguments: object):
    return CliRunner().invoke(cellfast, ["export", *map(str, arguments)])


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_model_gives_the_models_features(name, screen, model, tmp_path):
    out = tmp_path / f"m.{SUFFIX[name]}"
    result = export(model, "-o", out, "--format", name, "--check", screen)
    assert result.exit_code == 0, result.exception
    difference = re.search(r"34 crops of .*largest difference (\S+) absolute, (\S+) relative", result.output)
    assert difference is not None, result.output
    assert float(difference[2]) < 1e-5
    exported, loaded = load_exported(out), load_model(model)
    for store in Screen.open(screen).plates:
        crops = np.array(store.crops())
        expected = oracle(model, crops, loaded.low, loaded.high)
        for count in (1, 5, len(crops)):
            found = exported(torch.from_numpy(crops[:count]))
            assert found.dtype == torch.float32
            np.testing.assert_allclose(found.numpy(), expected[:count], rtol=1e-4, atol=1e-5)
    assert not [p.name for p in tmp_path.iterdir() if p != out]


@pytest.mark.parametrize("name", FORMATS)
def test_a_models_input_transform_is_part_of_what_is_exported(name, screen, tmp_path):
    model = make_model(tmp_path / "model.pt", transform="perakis2021")
    out = tmp_path / f"m.{SUFFIX[name]}"
    result = export(model, "-o", out, "--format", name, "--check", screen)
    assert result.exit_code == 0, result.exception
    exported, loaded = load_exported(out), load_model(model)
    crops = np.array(Screen.open(screen).plates[0].crops())
    expected = oracle(model, crops, loaded.low, loaded.high)
    np.testing.assert_allclose(exported(torch.from_numpy(crops)).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_scaling_per_plate_makes_low_and_high_inputs(name, tmp_path):
    model = make_model(tmp_path / "model.pt", bits=8, scaling="plate")
    screen = make_screen(tmp_path / "screen", np.uint8)
    out = tmp_path / f"m.{SUFFIX[name]}"
    summary = export_model(load_model(model), out, check=Screen.open(screen), features="z", batch_size=4)
    assert summary.cells_checked == 34
    exported = load_exported(out)
    assert [i["name"] for i in exported.metadata["inputs"]] == ["crops", "low", "high"]
    outputs = []
    for store in Screen.open(screen).plates:
        low, high = (torch.tensor(value, dtype=torch.float32) for value in (store.scale_low, store.scale_high))
        # 21 and 13 crops in minibatches of exactly 4: the last one is filled up.
        outputs.append(exported(torch.from_numpy(np.array(store.crops())), low, high).numpy())
        expected = oracle(model, store.crops(), store.scale_low, store.scale_high, "z")
        np.testing.assert_allclose(outputs[-1], expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(CellfastError, match="give low and high"):
            exported(torch.from_numpy(np.array(store.crops())))


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_carries_what_it_takes_and_where_it_comes_from(name, model, tmp_path):
    out = tmp_path / f"m.{SUFFIX[name]}"
    export_model(load_model(model), out)
    # By each format's own interface, as a program that does not know cellfast would.
    with export_module.quiet():
        if name == "torchscript":
            files = {"cellfast.json": ""}
            torch.jit.load(str(out), _extra_files=files)
            text = files["cellfast.json"]
        elif name == "pt2":
            files = {"cellfast.json": ""}
            torch.export.load(out, extra_files=files)
            text = files["cellfast.json"]
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
            text = session.get_modelmeta().custom_metadata_map["cellfast.json"]
    found = json.loads(text)
    assert found == read_export_metadata(out)
    loaded = load_model(model)
    assert found["channels"] == CHANNELS
    assert (found["crop_size"], found["output_size"], found["pixels"], found["scaling"]) == (SIZE, OUTPUT, "uint16", "screen")
    assert (found["low"], found["high"]) == (loaded.metadata.low, loaded.metadata.high)
    assert found["model"]["digest"] == loaded.digest
    assert found["training_data"] == "ab" * 32
    assert found["exported_with"]["cellfast_version"]
    assert found["feature_names"][-1] == "h063"
    shown = CliRunner().invoke(cellfast, ["info", str(out)])
    assert json.loads(shown.output) == found


def test_a_torchscript_file_refuses_other_crops_and_takes_wider_types(model, tmp_path):
    export_model(load_model(model), tmp_path / "m.ts")
    program = load_exported(tmp_path / "m.ts").program
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 65535, (3, 3, SIZE, SIZE)).astype(np.uint16))
    with torch.inference_mode():
        expected = program(crops)
        for dtype in (torch.int32, torch.float32):
            assert torch.equal(program(crops.to(dtype)), expected)
        for wrong, says in (
            (crops[:, :2], r"crops must have shape \[B, 3, 25, 25\]"),
            (crops[:, :, 1:, 1:], r"crops must have shape"),
            (crops.to(torch.int16), "crops must be uint16"),
            ((crops.to(torch.int32) >> 8).to(torch.uint8), "crops must be uint16"),
        ):
            with pytest.raises(Exception, match=says):
                program(wrong)


def test_a_file_that_disagrees_is_not_written(model, tmp_path, monkeypatch):
    out = tmp_path / "m.ts"
    export_model(load_model(model), out)
    before = out.read_bytes()
    original = export_module.center_crop
    # As if the exported window lay one pixel off.
    monkeypatch.setattr(export_module, "center_crop", lambda crops, *rest, **more: original(crops.roll(1, 3), *rest, **more))
    with pytest.raises(CellfastError, match=r"features differ from the Python model's by .* was not written"):
        export_model(load_model(model), out, force=True)
    with pytest.raises(CellfastError, match="was not written"):
        export_model(load_model(model), tmp_path / "other.ts")
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.ts"]


def test_mistakes_are_told(model, screen, tmp_path, monkeypatch):
    def refused(*arguments: object) -> str:
        result = export(*arguments)
        assert isinstance(result.exception, CellfastError), (result.output, result.exception)
        return str(result.exception)

    assert "names no format" in refused(model, "-o", tmp_path / "m.bin")
    assert "is named *.onnx, not *.ts" in refused(model, "-o", tmp_path / "m.ts", "--format", "onnx")
    assert "is the model itself" in refused(model, "-o", model, "--force")
    (tmp_path / "m.ts").write_text("kept")
    assert "--force to replace it" in refused(model, "-o", tmp_path / "m.ts")
    assert (tmp_path / "m.ts").read_text() == "kept"
    other = make_screen(tmp_path / "other", channels=["DNA", "Actin", "Tubulin"])
    message = refused(model, "-o", tmp_path / "n.ts", "--check", other)
    assert "the model has DNA, Tubulin, Actin, the screen has DNA, Actin, Tubulin (the same channels in another order)" in message
    narrow = make_screen(tmp_path / "narrow", np.uint8)
    assert "pixels: the model has 16-bit, the screen has 8-bit" in refused(model, "-o", tmp_path / "n.ts", "--check", narrow)
    assert export(model, "-o", tmp_path / "n.ts", "--batch-size", "many").exit_code == 2
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest))
    message = refused(model, "-o", tmp_path / "n.onnx")
    assert "onnxruntime" in message
    assert "pip install 'cellfast[onnx]'" in message
    assert not (tmp_path / "n.ts").exists()
    assert not (tmp_path / "n.onnx").exists()
    with pytest.raises(CellfastError, match="not a file written by cellfast export"):
        load_exported(model)


def test_a_model_without_finite_features_is_not_exported(model, tmp_path):
    loaded = load_model(model)
    next(loaded.model.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(CellfastError, match="not finite"):
        export_model(loaded, tmp_path / "m.ts")
    assert not list(tmp_path.iterdir())


# The C++ example.


def torch_root() -> str:
    return torch.__path__[0]


def hdf5_flags() -> list[str]:
    """Compiler options for HDF5 by pkg-config, or none; ``$CELLFAST_TEST_HDF5_FLAGS`` names an HDF5 elsewhere."""
    if flags := os.environ.get("CELLFAST_TEST_HDF5_FLAGS"):
        return flags.split()
    if shutil.which("pkg-config"):
        for name in ("hdf5", "hdf5-serial"):
            done = subprocess.run(["pkg-config", "--cflags", "--libs", name], capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.split()
    return []


@pytest.fixture(scope="module")
def embed_crops(tmp_path_factory) -> Path:
    """The example, compiled by the command of its README."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler: g++ was not found")
    folder = tmp_path_factory.mktemp("cpp")
    block = re.search(r"^g\+\+ .*?[^\\]$", (EXAMPLE / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    command = block[0].replace("$TORCH", torch_root()).replace("\\\n", " ").replace("-O2", "-O1").split()
    command[command.index("-o") + 1] = str(folder / "embed_crops")
    if flags := hdf5_flags():
        command += ["-DCELLFAST_WITH_HDF5", *flags]
    done = subprocess.run([*command, "-Wall", "-Wextra", "-Werror"], capture_output=True, text=True, cwd=EXAMPLE.parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "embed_crops"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments), "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_cpp_example_embeds_a_crop_store_as_python_does(embed_crops, screen, model, tmp_path):
    assert export(model, "-o", tmp_path / "m.ts").exit_code == 0
    embedded = CliRunner().invoke(cellfast, ["embed", str(screen), "--model", str(model), "-o", str(tmp_path / "e")])
    assert embedded.exit_code == 0, embedded.exception
    files = json.loads(CliRunner().invoke(cellfast, ["info", str(screen), "--json"]).output)["files"]
    assert [f["plate"] for f in files] == list(PLATES)
    for f in files:
        names = read_export_metadata(tmp_path / "m.ts")["feature_names"]
        table = pq.read_table(tmp_path / "e" / f"{f['plate']}.parquet").to_pandas()
        assert [name for name in table.columns if not name.startswith("Metadata_")] == names
        expected = table[names].to_numpy()
        options = ("--shape", ",".join(map(str, f["shape"])), "--dtype", f["dtype"], "--offset", f["offset"])
        for batch_size in (1, 8, 256):
            done = run(embed_crops, tmp_path / "m.ts", f["file"], tmp_path / "o.npy", *options, "--batch-size", batch_size)
            assert done.returncode == 0, done.stderr
            found = np.load(tmp_path / "o.npy", allow_pickle=False)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        if hdf5_flags():
            done = run(embed_crops, tmp_path / "m.ts", f["file"], tmp_path / "h.npy")
            assert done.returncode == 0, done.stderr
            np.testing.assert_array_equal(np.load(tmp_path / "h.npy"), found)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_the_cpp_example_takes_scaling_per_plate_and_a_fixed_minibatch(embed_crops, tmp_path):
    model = make_model(tmp_path / "model.pt", bits=8, scaling="plate")
    screen = Screen.open(make_screen(tmp_path / "screen", np.uint8))
    assert export(model, "-o", tmp_path / "m.ts", "--batch-size", "4").exit_code == 0
    for store in screen.plates:
        (tmp_path / "crops.raw").write_bytes(store.crops().tobytes())
        options = ("--shape", ",".join(map(str, store.crops().shape)), "--dtype", "uint8")
        scaling = ("--low", ",".join(map(str, store.scale_low)), "--high", ",".join(map(str, store.scale_high)))
        done = run(embed_crops, tmp_path / "m.ts", tmp_path / "crops.raw", tmp_path / "o.npy", *options, *scaling)
        assert done.returncode == 0, done.stderr
        expected = oracle(model, store.crops(), store.scale_low, store.scale_high)
        np.testing.assert_allclose(np.load(tmp_path / "o.npy"), expected, rtol=1e-4, atol=1e-5)
        if hdf5_flags():
            done = run(embed_crops, tmp_path / "m.ts", store.path, tmp_path / "h.npy")
            assert done.returncode == 0, done.stderr
            np.testing.assert_allclose(np.load(tmp_path / "h.npy"), expected, rtol=1e-4, atol=1e-5)
    done = run(embed_crops, tmp_path / "m.ts", tmp_path / "crops.raw", tmp_path / "p.npy", *options)
    assert done.returncode == 1
    assert "scaled per plate: --low expects one value per channel (3), got 0" in done.stderr


@pytest.mark.slow
def test_the_cpp_example_tells_mistakes_and_leaves_no_file(embed_crops, model, tmp_path):
    assert export(model, "-o", tmp_path / "m.ts").exit_code == 0
    crops = np.zeros((4, 3, SIZE, SIZE), np.uint16)
    (tmp_path / "crops.raw").write_bytes(crops.tobytes())
    out = tmp_path / "o.npy"
    good = ("--shape", "4,3,25,25", "--dtype", "uint16")
    for wrong, status, says in (
        (
            ("--shape", "4,2,25,25", "--dtype", "uint16"),
            1,
            "takes 3 channels (DNA, Tubulin, Actin) of 25 x 25 px, the crops are 2",
        ),
        (("--shape", "4,3,25,25", "--dtype", "uint8"), 1, "takes 16-bit pixels, the crops have 8"),
        (
            ("--shape", "5,3,25,25", "--dtype", "uint16"),
            1,
            f"has {crops.nbytes} bytes, the crops end at byte {crops.nbytes * 5 // 4}",
        ),
        ((*good, "--low", "1,2,3"), 1, "has its scaling inside"),
        ((*good, "--device", "abacus"), 1, "abacus"),
        (("--shape", "4,3,x", "--dtype", "uint16"), 2, "--shape expects numbers"),
        ((*good, "--batch-size", "0"), 2, "at least 1, got '0'"),
        ((*good, "--frobnicate", "0"), 2, "unknown option --frobnicate"),
    ):
        done = run(embed_crops, tmp_path / "m.ts", tmp_path / "crops.raw", out, *wrong)
        assert done.returncode == status, (wrong, done.stderr)
        assert says in done.stderr, (wrong, done.stderr)
    assert run(embed_crops, model, tmp_path / "crops.raw", out, *good).returncode == 1
    assert run(embed_crops, tmp_path / "m.ts", tmp_path / "missing.raw", out, *good).returncode == 1
    assert run(embed_crops, tmp_path / "m.ts", tmp_path / "crops.raw", tmp_path / "no" / "o.npy", *good).returncode == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["crops.raw", "m.ts"]
    done = run(embed_crops, tmp_path / "m.ts", tmp_path / "crops.raw", out, "--shape", "0,3,25,25", "--dtype", "uint16")
    assert done.returncode == 0, done.stderr
    assert np.load(out).shape == (0, 64)


@pytest.mark.slow
def test_the_cmake_file_builds_and_links_libtorch(tmp_path):
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("no CMake or no C++ compiler was found")
    # The example itself is compiled above; compiling it twice would take half a minute more.
    shutil.copy(EXAMPLE / "CMakeLists.txt", tmp_path)
    (tmp_path / "embed_crops.cpp").write_text(
        "#include <ATen/Context.h>\n#include <iostream>\nint main() { std::cout << at::hasCUDA() << std::endl; }\n"
    )
    build = str(tmp_path / "build")
    for command in (["cmake", "-S", str(tmp_path), "-B", build, f"-DTORCH_ROOT={torch_root()}"], ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    # hasCUDA only where libtorch's CUDA part was loaded, which needs a linker option.
    done = subprocess.run([f"{build}/embed_crops"], capture_output=True, text=True)
    assert done.stdout == f"{int(torch.cuda.is_available())}\n", done.stderr
    refused = subprocess.run(["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "b")], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "TORCH_ROOT" in refused.stderr

"""Build, test and measure on a GPU machine in one go, and write JSON: what ``make bench-gpu OUT=DIR [WHEELS=DIR]`` runs.

Needs no package to start with: only Python, and torch for everything but the first step. Each step runs in a process of its own with a
time limit; one that fails is recorded with its last lines and the others go on. ``CELLFAST_BENCH_DEVICE=cpu`` is a dry run at tiny sizes:
it shows that the script works, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-gpu"
# module → the distribution that brings it. Installed one by one: a missing one spoils only what needs it.
PACKAGES = {
    "numpy": "numpy", "setuptools": "setuptools", "ninja": "ninja", "packaging": "packaging", "click": "click", "yaml": "pyyaml",
    "h5py": "h5py", "hdf5plugin": "hdf5plugin", "numba": "numba", "pandas": "pandas", "pyarrow": "pyarrow", "tifffile": "tifffile",
    "imagecodecs": "imagecodecs", "PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image", "rich": "rich",
    "matplotlib": "matplotlib", "tensorboard": "tensorboard", "torchvision": "torchvision", "kornia": "kornia",
    "nvidia.dali": "nvidia-dali-cuda130", "pytest": "pytest",
}  # fmt: skip


def missing_packages() -> dict[str, str]:
    """module → distribution of those that this interpreter does not find."""
    missing = {}
    for module, distribution in PACKAGES.items():
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the parent package of a submodule
            found = False
        if not found:
            missing[module] = distribution
    return missing


class Bench:
    """Runs steps one after the other and keeps ``summary.json`` up to date after each."""

    def __init__(self, out: Path, device: str, limit_s: float) -> None:
        self.out, self.device, self.limit_s = out, device, limit_s
        self.tiny = device == "cpu"
        self.python = sys.executable
        self.summary: dict[str, Any] = {"device": device, "dry_run": self.tiny, "steps": {}}

    def step(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        try:
            entry = {"ok": True, **run()}
        except Exception as error:
            entry = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(time.monotonic() - start, 1)
        self.summary["steps"][name] = entry
        self.save()
        print(f"  {'ok' if entry['ok'] else 'FAILED: ' + entry.get('error', '')} ({entry['seconds']} s)", flush=True)

    def save(self) -> None:
        target = self.out / "summary.json"
        temporary = target.with_suffix(".partial")
        temporary.write_text(json.dumps(self.summary, indent=2) + "\n")
        temporary.replace(target)

    def command(self, name: str, command: list[str], *, env: dict[str, str] | None = None, limit_s: float | None = None) -> str:
        """Run ``command`` in the checkout, keep its output in NAME.log and return it; raise where it fails."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        log = self.out / f"{name}.log"
        with log.open("w") as stream:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=limit_s or self.limit_s
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"no end after {limit_s or self.limit_s:.0f} s"
        text = log.read_text(errors="replace")
        if code != 0:
            tail = " | ".join(line.strip() for line in text.strip().splitlines()[-6:])
            raise RuntimeError(f"{code}: {tail[-1500:]}")
        return text

    def environment(self) -> dict[str, Any]:
        def said(*command: str) -> str:
            try:
                return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
            except (OSError, subprocess.SubprocessError) as error:
                return f"not available: {error}"

        versions = (
            "import json, torch; print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
            "'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}))"
        )
        return {
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "torch": said(self.python, "-c", versions),
            "nvidia_smi": said(
                "nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"
            ),
            "nvcc": said("nvcc", "--version").splitlines()[-2:],
            "commit": said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
            "missing_packages": sorted(missing_packages().values()),
        }

    def install(self, wheels: Path | None) -> dict[str, Any]:
        wanted = missing_packages()
        if not wanted:
            return {"note": "nothing is missing"}
        if wheels is None:
            return {"note": f"no WHEELS folder given; missing: {', '.join(wanted.values())}: what needs them will fail by name"}
        # An environment that sees all this interpreter sees, also where that is an environment itself.
        self.command("install-venv", [sys.executable, "-m", "venv", "--system-site-packages", str(ENVIRONMENT)])
        self.python = str(ENVIRONMENT / "bin" / "python")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        mine = Path(subprocess.run([self.python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
        (mine / "interpreter.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
        failed = []
        for distribution in wanted.values():
            pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--find-links"]
            try:
                self.command(f"install-{distribution}", [*pip, str(wheels), distribution])
            except RuntimeError as error:
                failed.append(f"{distribution}: {str(error)[-300:]}")
        return {"installed": sorted(set(wanted.values())), "failed": failed}

    def build(self) -> dict[str, Any]:
        text = self.command(
            "build", [self.python, "setup.py", "--quiet", "build_ext", "--inplace"],
            env={} if self.tiny else {"CELLFAST_CUDA": "1"}, limit_s=1800,
        )  # fmt: skip
        return {"chosen": next((line for line in text.splitlines() if line.startswith("cellfast:")), "")}

    def tests(self) -> dict[str, Any]:
        report = self.out / "tests.xml"
        report.unlink(missing_ok=True)
        # A dry run collects the tests, which then skip themselves.
        env = {} if self.tiny else {"CELLFAST_REQUIRE_CUDA": "1"}
        command = [self.python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            self.command("tests", command, env=env, limit_s=1800)
            error = None
        except RuntimeError as failure:
            error = str(failure)
        if not report.exists():
            raise RuntimeError(error or "pytest wrote no report")
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        return {"ok": error is None, **counts, "failed": failed, **({"error": error} if error else {})}

    def measure(self, name: str) -> dict[str, Any]:
        file = self.out / f"{name}.json"
        file.unlink(missing_ok=True)
        command = [self.python, "benchmarks/gpu_measure.py", name, "--device", self.device, "--out", str(file)]
        self.command(name, command + (["--tiny"] if self.tiny else []))
        return {"file": file.name}


def table(out: Path) -> list[str]:
    """The figures that the targets name, one line each."""
    lines = []
    for path in sorted(out.glob("step-*.json")):
        result = json.loads(path.read_text())
        parts = [f"constant {result['constant']['cells_per_second']:,.0f} cells/s"]
        for feed in ("resident", "stream"):
            if "cells_per_second" in result.get(feed, {}):
                parts.append(f"{feed} {result[feed]['cells_per_second']:,.0f} ({100 * result[feed]['fraction']:.1f} %)")
            elif feed in result:
                parts.append(f"{feed} {result[feed]['failed'][:120]}")
        if "augment_share" in result:
            parts.append(f"views {100 * result['augment_share']:.1f} % of the step")
        lines.append(f"{path.stem:32s} {', '.join(parts)}")
    for path in sorted(out.glob("embed-*.json")):
        result = json.loads(path.read_text())
        lines.append(
            f"{path.stem:32s} resident {result['resident']['cells_per_second']:,.0f} cells/s ({100 * result['fraction']:.1f} %)"
        )
    if (out / "decode.json").exists():
        for row in json.loads((out / "decode.json").read_text())["rows"]:
            rate = (
                f"{row['decode_fields_per_second']:,.0f} fields/s" if "decode_fields_per_second" in row else row["failed"][:120]
            )
            lines.append(f"decode {row['compression']:8s} {row['decode']:6s} {row['threads']:3d} threads   {rate}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, help="A folder of wheels to install what is missing from; nothing is downloaded.")
    parser.add_argument("--only", help="Comma-separated step names.")
    parser.add_argument("--limit", type=float, default=600, help="Seconds that one measurement may take.")
    options = parser.parse_args()
    device = os.environ.get("CELLFAST_BENCH_DEVICE", "cuda")
    if device not in ("cuda", "cpu"):
        parser.error(f"CELLFAST_BENCH_DEVICE must be cuda or cpu, got {device!r}")
    options.out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_measure import MEASURES, NOT_IN_DRY_RUN

    bench = Bench(options.out.resolve(), device, options.limit)
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "environment": bench.environment,
        "install": lambda: bench.install(options.wheels),
        "build": bench.build,
        "tests": bench.tests,
    }
    for name in MEASURES:
        if not (bench.tiny and name in NOT_IN_DRY_RUN):
            steps[name] = lambda name=name: bench.measure(name)
    chosen = options.only.split(",") if options.only else list(steps)
    if unknown := sorted(set(chosen) - set(steps)):
        parser.error(f"unknown steps {', '.join(unknown)}: the steps are {', '.join(steps)}")
    for name in chosen:
        bench.step(name, steps[name])
    bench.summary["table"] = table(bench.out)
    bench.save()
    print("\n".join(bench.summary["table"]))
    failed = [name for name, entry in bench.summary["steps"].items() if not entry["ok"]]
    print(
        f"{len(bench.summary['steps'])} steps, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}; {bench.out / 'summary.json'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Build, test and measure on a GPU machine in one go, and write JSON: what ``make bench-gpu OUT=DIR`` runs.

Needs no package to start with: only Python, and torch for everything but the first step. Each step runs in a process of its own with a
time limit; one that fails is recorded with its last lines and the others go on. OUT gets five files at most, kept up to date all the time:
``summary.json`` (environment, steps, a table), ``measurements.json`` (every figure, those of a step that was stopped half-way too), ``log.txt``
and the tests' two JUnit reports.

Where a machine is lent for minutes at a time, ``--budget SECONDS`` ends the call in time and ``--resume`` goes on in the next one with what
was not begun or was cut short. ``CELLFAST_BENCH_DEVICE=cpu`` is a dry run at tiny sizes: it shows that the script works, its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpu_table import failures, table

ROOT = Path(__file__).resolve().parent.parent
# What outlives a call: results so far, and packages that were missing.
STATE, SITE = ROOT / "build" / "bench-gpu", ROOT / "build" / "bench-gpu-site"
# module → the distribution that brings it. One that is missing spoils only what needs it.
PACKAGES = {
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "setuptools": "setuptools", "packaging": "packaging",
    "click": "click", "yaml": "pyyaml", "h5py": "h5py", "numba": "numba", "pandas": "pandas", "pyarrow": "pyarrow",
    "tifffile": "tifffile", "imagecodecs": "imagecodecs", "PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image",
    "matplotlib": "matplotlib", "tensorboard": "tensorboard", "kornia": "kornia",
    "nvidia.dali": "nvidia-dali-cuda130", "pytest": "pytest",
}  # fmt: skip
# A kernel that has never run may never end, and an address out of bounds spoils its whole process: those tests have one of their own.
SM90A_TESTS = "sm90a or million or many_rows"
LEAST_S = 15.0  # a step is not begun with less of the budget left


class CutShort(RuntimeError):
    """The budget of the call ended before the step did."""


def unusable_packages(python: str, env: dict[str, str]) -> dict[str, str]:
    """module → why this interpreter cannot import it; each is imported, because two that are there may not fit together."""
    code = (
        "import importlib, json, sys\n"
        "bad = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        bad[name] = f'{type(error).__name__}: {str(error)[:200]}'\n"
        "print('\\n' + json.dumps(bad))\n"
    )
    done = subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, text=True, timeout=300, env=env)
    if done.returncode != 0:
        return {"all": f"importing them ended with {done.returncode}: {done.stderr[-300:]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def wheels_to_install(folder: Path, unusable: dict[str, str]) -> list[Path]:
    """The wheels of ``folder`` whose distribution is not installed, or is but cannot be imported."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    broken = {plain(PACKAGES[module]) for module in unusable if module in PACKAGES}
    installed = {plain(found.metadata["Name"] or "") for found in importlib.metadata.distributions()}
    return [
        wheel for wheel in sorted(folder.glob("*.whl"))
        if (name := plain(wheel.name.split("-")[0])) not in installed or name in broken
    ]  # fmt: skip


def source_digest() -> str:
    """One number for all that a result depends on: a copy of the sources may have no history."""
    digest = hashlib.sha256()
    for part in ("setup.py", "benchmarks", "cellfast", "csrc", "tests"):
        paths = [ROOT / part] if (ROOT / part).is_file() else sorted((ROOT / part).rglob("*"))
        for path in paths:
            if path.suffix in (".py", ".h", ".cuh", ".cu", ".cpp"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Bench:
    """Runs steps one after the other; ``state`` keeps what they made, ``out`` gets the files to look at after each."""

    def __init__(
        self, out: Path, device: str, limit_s: float, *, state: Path = STATE, budget_s: float | None = None, resume: bool = False
    ) -> None:
        self.out, self.state, self.device, self.limit_s = out, state, device, limit_s
        self.tiny = device == "cpu"
        self.python = sys.executable
        self.ends = None if budget_s is None else time.monotonic() + budget_s
        self.summary: dict[str, Any] = {"device": device, "dry_run": self.tiny, "source": source_digest(), "steps": {}}
        self.earlier: set[str] = set()
        if resume:
            self._resume()
        else:
            shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)

    def _resume(self) -> None:
        kept = self.state / "summary.json"
        earlier = json.loads(kept.read_text()) if kept.exists() else {}
        same = all(earlier.get(key) == self.summary[key] for key in ("device", "source"))
        if same:
            self.summary["steps"] = {
                name: entry
                for name, entry in earlier["steps"].items()
                if not entry.get("cut_short") or not entry.get("not_begun")
            }
            self.earlier = {name for name, entry in earlier["steps"].items() if not entry.get("cut_short")}
        else:
            print("nothing to resume here: there is no earlier call, or the sources have changed", flush=True)
            shutil.rmtree(self.state, ignore_errors=True)

    def step(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        start = time.monotonic()
        if name in self.earlier:
            return
        if self.ends is not None and self.ends - start < LEAST_S:
            entry = {"ok": False, "cut_short": True, "not_begun": True, "error": "not begun: the budget of this call is used up"}
        else:
            print(f"{name} ...", flush=True)
            try:
                entry = {"ok": True, **run()}
            except CutShort as error:
                entry = {"ok": False, "cut_short": True, "error": str(error)}
            except Exception as error:
                entry = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(time.monotonic() - start, 1)
        self.summary["steps"][name] = entry
        self.save()
        print(f"  {name}: {'ok' if entry['ok'] else 'FAILED: ' + entry.get('error', '')} ({entry['seconds']} s)", flush=True)

    def save(self) -> None:
        """Everything so far, into whole files."""
        results = self.results()
        self.summary["table"] = table(results)
        summary = json.dumps(self.summary, indent=2) + "\n"
        files = {self.state / "summary.json": summary, self.out / "summary.json": summary}
        files[self.out / "measurements.json"] = json.dumps(results, indent=2) + "\n"
        logs = sorted(self.state.glob("*.log"), key=lambda path: path.stat().st_mtime)
        files[self.out / "log.txt"] = "".join(f"===== {p.stem}\n{p.read_text(errors='replace')[-300_000:]}\n" for p in logs)
        files |= {self.out / p.name: p.read_text(errors="replace") for p in self.state.glob("tests*.xml")}
        for target, text in files.items():
            temporary = target.with_name(target.name + ".partial")
            temporary.write_text(text)
            temporary.replace(target)

    def results(self) -> dict[str, Any]:
        """What the measurements wrote, by step; a file that a stopped step left half-way counts as far as it goes."""
        return {path.stem: json.loads(path.read_text()) for path in sorted(self.state.glob("*.json")) if path.stem != "summary"}

    def environ(self) -> dict[str, str]:
        """The steps' environment: this checkout and the packages installed for it come first."""
        before = [str(SITE)] if SITE.is_dir() else []
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *before]), "PYTHONUNBUFFERED": "1"}

    def command(self, name: str, command: list[str], *, env: dict[str, str] | None = None, limit_s: float | None = None) -> str:
        """Run ``command`` in the checkout, keep its output in the log NAME and return it; raise where it fails or takes too long."""
        limit = limit_s or self.limit_s
        left = None if self.ends is None else self.ends - time.monotonic()
        cut = left is not None and left < limit
        log = self.state / f"{name}.log"
        with log.open("w") as stream:
            # A session of its own: compilers and other children end with it.
            process = subprocess.Popen(
                command, cwd=ROOT, env={**self.environ(), **(env or {})}, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )  # fmt: skip
            try:
                code: Any = process.wait(timeout=left if cut else limit)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    pass  # stuck in the driver
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = f"no end after {left if cut else limit:.0f} s"
                if cut:
                    code += ", when the budget of this call ended"
        text = log.read_text(errors="replace")
        if code != 0:
            tail = " | ".join(line.strip() for line in text.strip().splitlines()[-6:])
            raise (CutShort if cut and isinstance(code, str) else RuntimeError)(f"{code}: {tail[-1500:]}")
        return text

    def environment(self) -> dict[str, Any]:
        def said(*command: str) -> str:
            try:
                return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
            except (OSError, subprocess.SubprocessError) as error:
                return f"not available: {error}"

        versions = (
            "import json, torch; n = torch.cuda.device_count(); print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, "
            "'cudnn': torch.backends.cudnn.version(), 'gpus': [torch.cuda.get_device_name(i) for i in range(n)], "
            "'capabilities': [torch.cuda.get_device_capability(i) for i in range(n)]}))"
        )
        return {
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "torch": said(self.python, "-c", versions),
            "nvidia_smi": said(
                "nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"
            ),
            "nvcc": said("nvcc", "--version").splitlines()[-2:],
            "cxx": said("c++", "--version").splitlines()[:1],
            "commit": said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        }

    def install(self, wheels: Path | None) -> dict[str, Any]:
        unusable = unusable_packages(self.python, self.environ())
        chosen = wheels_to_install(wheels, unusable) if wheels is not None else []
        failed = []
        if chosen:
            # Into a folder beside the interpreter's packages, which stay as they are; no environment, for which Debian's Python may lack a part.
            pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
            pip += ["--no-compile", "--upgrade", "--target", str(SITE)]
            try:
                self.command("install", [*pip, *map(str, chosen)])
            except RuntimeError:
                for wheel in chosen:
                    try:
                        self.command(f"install-{wheel.name.split('-')[0]}", [*pip, str(wheel)])
                    except RuntimeError as error:
                        failed.append(f"{wheel.name}: {str(error)[-300:]}")
            unusable = unusable_packages(self.python, self.environ())
        result: dict[str, Any] = {"installed": [wheel.name for wheel in chosen], "failed": failed, "unusable": unusable}
        if unusable:
            result["note"] = "what needs the unusable packages will fail, or be left out, by name"
        return result

    def build(self) -> dict[str, Any]:
        # A dry run needs no GPU code.
        env = {"MAX_JOBS": str(os.cpu_count() or 2), "CELLFAST_CUDA": "0" if self.tiny else "1"}
        if not self.tiny:
            # The machine code of this GPU alone: a third of the compiler's time.
            if not os.environ.get("CELLFAST_CUDA_ARCHS"):
                ask = "import torch; print(*torch.cuda.get_device_capability())"
                major, minor = map(int, self.command("capability", [self.python, "-c", ask], limit_s=120).split()[-2:])
                env["CELLFAST_CUDA_ARCHS"] = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
        text = self.command("build", [self.python, "setup.py", "--quiet", "build_ext", "--inplace"], env=env, limit_s=1200)
        ask = "import json; from cellfast.ops import backends; print(json.dumps({b.name: b.reason for b in backends().values()}))"
        missing = json.loads(self.command("load", [self.python, "-c", ask], limit_s=120).strip().splitlines()[-1])
        if not self.tiny and missing["_C_cuda"]:
            raise RuntimeError(f"built, but not usable: {missing['_C_cuda']}")
        return {"chosen": [line for line in text.splitlines() if line.startswith("cellfast:")], "why_not_loaded": missing}

    def tests(self, name: str, which: str, limit_s: float) -> dict[str, Any]:
        report = self.state / f"{name}.xml"
        report.unlink(missing_ok=True)
        # A dry run collects the tests, which then skip themselves. Warnings of other versions of other packages are no failures here.
        env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **({} if self.tiny else {"CELLFAST_REQUIRE_CUDA": "1"})}
        command = [
            self.python,
            "-m",
            "pytest",
            "-v",
            "--tb=short",
            "-m",
            "cuda",
            "-k",
            which,
            "-W",
            "default",
            "-p",
            "no:cacheprovider",
        ]
        command += ["--continue-on-collection-errors", "--durations=10", f"--junitxml={report}"]
        error = None
        try:
            self.command(name, command, env=env, limit_s=limit_s)
        except CutShort:
            raise
        except RuntimeError as failure:
            error = str(failure)
        if not report.exists():
            log = (self.state / f"{name}.log").read_text(errors="replace")
            passed, lines = log.count(" PASSED"), [line for line in log.splitlines() if line.startswith("tests/")]
            raise RuntimeError(
                f"pytest wrote no report; {passed} tests had passed; last: {lines[-1] if lines else 'none'}; {error}"
            )
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        failed = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        return {"ok": error is None, **counts, "failed": failed, **({"error": error} if error else {})}

    def measure(self, name: str, limit_s: float | None = None) -> dict[str, Any]:
        file = self.state / f"{name}.json"
        file.unlink(missing_ok=True)
        command = [self.python, "benchmarks/gpu_measure.py", name, "--device", self.device, "--out", str(file)]
        self.command(name, command + (["--tiny"] if self.tiny else []), limit_s=limit_s)
        failed = failures(json.loads(file.read_text()))
        return {"ok": False, "error": "; ".join(failed)[:1500]} if failed else {}


def steps_of(bench: Bench, wheels: Path | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """The steps by name, in their order: what everything needs, then what matters most."""
    from gpu_measure import LIMITS, MEASURES, NOT_IN_DRY_RUN

    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "environment": bench.environment,
        "install": lambda: bench.install(wheels),
        "build": bench.build,
        "tests": lambda: bench.tests("tests", f"not ({SM90A_TESTS})", 400),
        "tests-sm90a": lambda: bench.tests("tests-sm90a", SM90A_TESTS, 180),
    }
    for name in MEASURES:
        if not (bench.tiny and name in NOT_IN_DRY_RUN):
            steps[name] = lambda name=name: bench.measure(name, LIMITS.get(name))
    return steps


def in_order(names: list[str], begun: Iterable[str]) -> list[str]:
    """The steps with what all need first, and last those that an earlier call stopped in: they would stop this one there too."""
    return sorted(names, key=lambda name: name in begun and name not in ("environment", "install", "build"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, help="A folder of wheels; those not installed are, nothing is downloaded.")
    parser.add_argument("--only", help="Comma-separated step names.")
    parser.add_argument("--limit", type=float, default=300, help="Seconds that one measurement may take.")
    parser.add_argument("--budget", type=float, help="Seconds that this call may take; later steps are left for --resume.")
    parser.add_argument("--resume", action="store_true", help="Go on where the last call with these sources ended.")
    options = parser.parse_args()
    device = os.environ.get("CELLFAST_BENCH_DEVICE", "cuda")
    if device not in ("cuda", "cpu"):
        parser.error(f"CELLFAST_BENCH_DEVICE must be cuda or cpu, got {device!r}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels {options.wheels}: there is no such folder")
    state = STATE.with_name(STATE.name + "-dry") if device == "cpu" else STATE
    bench = Bench(options.out.resolve(), device, options.limit, state=state, budget_s=options.budget, resume=options.resume)
    steps = steps_of(bench, options.wheels and options.wheels.resolve())
    chosen = options.only.split(",") if options.only else list(steps)
    if unknown := sorted(set(chosen) - set(steps)):
        parser.error(f"unknown steps {', '.join(unknown)}: the steps are {', '.join(steps)}")
    if options.only:
        bench.earlier -= set(chosen)  # asked for by name
    chosen = in_order(chosen, bench.summary["steps"])
    for name in chosen:
        bench.step(name, steps[name])
    bench.save()
    print("\n".join(bench.summary["table"]))
    failed = [name for name, entry in bench.summary["steps"].items() if not entry["ok"]]
    ended = f"{len(failed)} failed{': ' + ', '.join(failed) if failed else ''}"
    print(f"{len(bench.summary['steps'])} steps, {ended}; {bench.out / 'summary.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

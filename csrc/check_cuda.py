"""Compiles every CUDA file for the architectures of a release and prints registers and spills of every kernel: `make check-cuda`.

Needs the CUDA toolkit and torch's headers, no GPU. Exits with 0 and says why where there is no toolkit, unless CELLFAST_CUDA=1; exits with 1
where a file does not compile, a kernel spills more than a few registers, or the compiler serialises the matrix products of compute capability 9.0.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90a", "100")
# Bytes of spilled registers per thread that are no cause for alarm: what is stored once per row block, outside the loop over the tiles.
MOST_SPILLED = 200


def compile_file(nvcc: str, source: Path, architecture: str, options: list[str], folder: str) -> tuple[Path, str, int, str]:
    """One file for one architecture; the compiler's exit status and what it said."""
    target = Path(folder) / f"{source.stem}.{architecture}.{os.urandom(4).hex()}.cubin"
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-cubin", code, "-Xptxas", "-v", *options, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return source, architecture, done.returncode, done.stdout + done.stderr


def kernels(said: str) -> list[tuple[str, int, int]]:
    """Name, registers and spilled bytes of each kernel in the compiler's report."""
    found = []
    for part in re.split(r"Compiling entry function ", said)[1:]:
        mangled = part.split("'")[1]
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip() or mangled
        name = re.sub(r"\(anonymous namespace\)::|cellfast::ntxent::", "", name.split("(cellfast")[0])
        found.append((name[:80], int(registers.group(1)) if registers else 0, max(map(int, spilled.groups())) if spilled else 0))
    return found


def main() -> int:
    """Compile all, print all, say what is wrong."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    home, reason = setup["choose_cuda"]()
    if home is None:
        print(f"check-cuda: skipped, nothing was compiled: {reason}")
        return 0
    from torch.utils import cpp_extension

    include = [f"-I{ROOT / 'csrc'}", *(f"-isystem={path}" for path in cpp_extension.include_paths())]
    options = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DCELLFAST_SM90A", *setup["STABLE_ABI"], *include]
    nvcc = str(Path(home) / "bin" / "nvcc")
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    print(f"check-cuda: {nvcc}, {len(sources)} files for compute capabilities {', '.join(ARCHITECTURES)}", flush=True)
    wrong = []
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool,
    ):
        jobs = [pool.submit(compile_file, nvcc, s, a, options, folder) for a in ARCHITECTURES for s in sources]
        for job in jobs:
            source, architecture, status, said = job.result()
            name = f"{source.relative_to(ROOT / 'csrc')} for {architecture}"
            if status != 0:
                wrong.append(f"{name} does not compile:\n{said}")
                continue
            if "wgmma.mma_async instructions are serialized" in said:
                wrong.append(f"{name}: the compiler serialises wgmma instructions")
            for kernel, registers, spilled in kernels(said):
                print(f"  {name:45} {registers:4} registers {spilled:5} bytes spilled  {kernel}", flush=True)
                if spilled > MOST_SPILLED:
                    wrong.append(f"{name}: {kernel} spills {spilled} bytes")
    print("\n".join(["check-cuda: failed", *wrong]) if wrong else "check-cuda: everything compiles")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Builds the extension; everything else about the package is in pyproject.toml.

``cellfast/_C`` (CPU) is always built, ``cellfast/_C_cuda`` where the CUDA compiler is found. Both use libtorch's stable ABI, so one build
serves every torch from 2.10 on and every CPython from 3.10 on; neither needs Python's headers.

Environment:
    CELLFAST_CUDA       auto (default): build the CUDA part where nvcc is found; 0: never; 1: always, and fail where it cannot be.
    CELLFAST_CUDA_ARCH  compute capabilities, e.g. "80;90a" (default: 80;90;100 and PTX of the last, as far as the compiler knows them).
    CUDA_HOME           the CUDA toolkit's folder (default: the folder of the nvcc that is found).
    MAX_JOBS            number of compilers that run at once (default: 2).
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

os.environ.setdefault("MAX_JOBS", "2")
ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("80", "90", "100")
# libtorch 2.10 is the oldest whose stable ABI has all the extension calls.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]


def nvcc_of(folder: str | os.PathLike[str]) -> Path | None:
    """The compiler of a toolkit folder that has headers too, or None: a lone nvcc on PATH may be a shim somewhere else."""
    home = Path(folder)
    nvcc = home / "bin" / "nvcc"
    return nvcc if nvcc.is_file() and (home / "include" / "cuda_runtime.h").is_file() else None


def find_cuda_home() -> tuple[str | None, str]:
    """The toolkit's folder, and why it was chosen or why there is none."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        if nvcc_of(named):
            return os.path.realpath(named), f"CUDA_HOME={named}"
        return None, f"CUDA_HOME={named} has no bin/nvcc with include/cuda_runtime.h"
    on_path = shutil.which("nvcc")
    candidates = [str(Path(os.path.realpath(on_path)).parent.parent)] if on_path else []
    candidates += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda", "/usr/lib/cuda"]
    for folder in candidates:
        if nvcc_of(folder):
            return os.path.realpath(folder), f"nvcc found in {os.path.realpath(folder)}"
    return None, "no nvcc on PATH or under /usr/local/cuda*"


def choose_cuda() -> tuple[str | None, str]:
    """The toolkit's folder to build ``_C_cuda`` with, or None, and the reason. Raises SystemExit where CUDA is demanded and absent."""
    wanted = os.environ.get("CELLFAST_CUDA", "auto").strip().lower() or "auto"
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"CELLFAST_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "CELLFAST_CUDA=0"
    home, reason = find_cuda_home()
    import torch

    if home is not None and torch.version.cuda is None:
        home, reason = None, f"torch {torch.__version__} was built without CUDA"
    if home is None and wanted == "1":
        sys.exit(
            f"CELLFAST_CUDA=1, but the CUDA part cannot be built: {reason}. Install the CUDA toolkit and set CUDA_HOME to its folder."
        )
    return home, reason


def architecture_flags(nvcc: Path) -> list[str]:
    """``-gencode`` for each architecture asked for that this compiler knows, with PTX of the newest for GPUs that come later."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"sm_(\w+)", listed))
    asked = os.environ.get("CELLFAST_CUDA_ARCH")
    chosen = [a for a in re.split(r"[;, ]+", asked) if a] if asked else [a for a in DEFAULT_ARCHITECTURES if a in known]
    unknown = [a for a in chosen if a.rstrip("af") not in known]
    if unknown or not chosen:
        sys.exit(
            f"{nvcc} does not know the architectures {unknown or list(DEFAULT_ARCHITECTURES)}; it knows {sorted(known)}. Set CELLFAST_CUDA_ARCH."
        )
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    return flags + [f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def extensions() -> tuple[list, dict]:
    """The extension modules and the build command for them."""
    cuda_home, reason = choose_cuda()
    print(f"cellfast: _C (CPU): yes; _C_cuda: {'yes' if cuda_home else 'no'} ({reason})", flush=True)
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # read by torch when the next line imports it
    from torch.utils import cpp_extension

    headers = sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True))
    include = [str(ROOT / "csrc")]
    cxx = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *STABLE_ABI]
    modules = [
        cpp_extension.CppExtension(
            "cellfast._C",
            ["csrc/library.cpp", *sorted(glob.glob("csrc/*/cpu/*.cpp"))],
            include_dirs=include,
            extra_compile_args={"cxx": cxx},
            depends=headers,
            py_limited_api=True,
        )
    ]
    if cuda_home:
        cpp_extension.CUDA_HOME = cuda_home
        nvcc_flags = ["-O3", "-std=c++20", "-DUSE_CUDA", *STABLE_ABI, *architecture_flags(Path(cuda_home) / "bin" / "nvcc")]
        modules.append(
            cpp_extension.CUDAExtension(
                "cellfast._C_cuda",
                sorted(glob.glob("csrc/*/cuda/*.cu")),
                include_dirs=include,
                extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc_flags},
                depends=headers,
                py_limited_api=True,
            )
        )
    return modules, {"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)}


# Metadata queries (egg_info, sdist, --version) need neither torch nor a compiler.
if {"egg_info", "dist_info", "sdist", "--version", "--name", "clean"} & set(sys.argv[1:]):
    setup()
else:
    ext_modules, cmdclass = extensions()
    setup(ext_modules=ext_modules, cmdclass=cmdclass, options={"bdist_wheel": {"py_limited_api": "cp310"}})

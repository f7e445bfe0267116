"""Builds the extension; everything else about the package is in pyproject.toml.

``cellfast/_C`` (CPU) is always built, ``cellfast/_C_cuda`` where the CUDA compiler is found. Both use libtorch's stable ABI, so one build
serves every torch from 2.10 on and every CPython from 3.10 on; neither needs Python's headers.

Environment:
    CELLFAST_CUDA       auto (default): build the CUDA part where nvcc is found; 0: never; 1: always, and fail where it cannot be.
    CELLFAST_CUDA_ARCHS compute capabilities, e.g. "80;90a" or "8.0;9.0a+PTX" (default: TORCH_CUDA_ARCH_LIST where that is set, else 80;90a;100
                        as far as the compiler knows them, and PTX of the last). 90a is what the kernels for H100 and H200 need; GPUs that
                        come later run the portable kernels from the PTX.
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
DEFAULT_ARCHITECTURES = ("80", "90a", "100")
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


def architectures(nvcc: Path) -> list[str]:
    """The compute capabilities to build for ("80", "90a", ...), machine code for each; those with "+PTX" for later GPUs too.

    Raises SystemExit where the compiler does not know one that was asked for.
    """
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"sm_(\d+)", listed))
    source = next((name for name in ("CELLFAST_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST") if os.environ.get(name, "").strip()), None)
    if source is None:
        chosen = [a for a in DEFAULT_ARCHITECTURES if a.rstrip("af") in known]
        return [*chosen[:-1], f"{chosen[-1]}+PTX"]
    chosen = [a.replace(".", "") for a in re.split(r"[;, ]+", os.environ[source].strip()) if a]
    wrong = [a for a in chosen if not (m := re.fullmatch(r"(\d+)[af]?(\+PTX)?", a)) or m.group(1) not in known]
    if wrong or not chosen:
        sys.exit(
            f"{source}={os.environ[source]!r}: {nvcc} does not know {wrong}; it knows {sorted(known, key=int)}, e.g. 80;90a;100+PTX."
        )
    return chosen


def architecture_flags(chosen: list[str]) -> list[str]:
    """The compiler's options for these compute capabilities."""
    flags = []
    for name in chosen:
        number = name.removesuffix("+PTX")
        code = f"sm_{number}" + (f",compute_{number}" if name.endswith("+PTX") else "")
        flags.append(f"-gencode=arch=compute_{number},code=[{code}]")
    # The host code says clearly when the kernels for H100 and H200 are not in the build.
    return [*flags, "-DCELLFAST_SM90A"] if any(name.startswith("90a") for name in chosen) else flags


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
        chosen = architectures(Path(cuda_home) / "bin" / "nvcc")
        print(f"cellfast: _C_cuda for compute capabilities {', '.join(chosen)}", flush=True)
        nvcc_flags = ["-O3", "-std=c++20", "-DUSE_CUDA", *STABLE_ABI, *architecture_flags(chosen)]
        modules.append(
            cpp_extension.CUDAExtension(
                "cellfast._C_cuda",
                sorted(glob.glob("csrc/*/cuda/**/*.cu", recursive=True)),
                include_dirs=include,
                extra_compile_args={"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc_flags},
                depends=headers,
                py_limited_api=True,
            )
        )
    return modules, {"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)}


# csrc/check_cuda.py takes the functions above from this file.
if __name__ == "__main__":
    # Metadata queries need neither torch nor a compiler.
    if {"egg_info", "dist_info", "sdist", "--version", "--name", "clean"} & set(sys.argv[1:]):
        setup()
    else:
        ext_modules, cmdclass = extensions()
        setup(ext_modules=ext_modules, cmdclass=cmdclass, options={"bdist_wheel": {"py_limited_api": "cp310"}})

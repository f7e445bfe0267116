"""Measurements in a process of their own, so that peak memory is their own: ``python worker.py``, with names of job files on standard input.

The peak of every job after the first begins at what the one before left. The same code times every implementation. It imports the
standard library, NumPy and PyTorch only, because it also runs in the environment of a reference checkout, where cellfast is not
installed. A job names the implementation's file and what to measure.

An implementation is a class ``Implementation(job)`` with ``name`` and ``description``, and of these the methods a job asks for:

=================  ==========================================================================================================
``load()``         crops on disk → a state from which minibatches can be drawn, every pixel read; returns the number of cells
``augment(n)``     n minibatches from the loaded crops, two views of every cell; returns the number of cells
``loss(z)``        z [2N, D] (rows i and i + N are one cell) → a callable that does forward and backward and returns (loss, ‖dz‖)
``step()``         a callable that does one training step on ready views and returns the loss
``epoch()``        one pass over minibatches: draw, augment, train; returns the number of cells
``embed()``        features h float32 [cells, F] of all cells, in the index's order
``score(f, m)``    features and metadata table → (NSC, NSCB), the part that is timed
``evaluate(f, m)`` treatments' profiles and metadata table → a callable that returns (NSC, NSCB)
``train(limit)``   training until ``limit(step)`` is true; returns (steps, last loss)
``agree(views)``   number-by-number comparison, see the methods
=================  ==========================================================================================================
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def memory_bytes(name: str) -> int:
    """``VmHWM`` (peak), ``VmRSS`` (now) or ``VmSize`` of this process in bytes. (``ru_maxrss`` would begin with the parent's.)"""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(run: Callable[[], Any], *, repeats: int, warm_up: int) -> tuple[list[float], Any]:
    """Seconds of each repeat, and what the last one returned."""
    seconds, value = [], None
    for turn in range(warm_up + repeats):
        gc.collect()
        start = time.perf_counter()
        value = run()
        elapsed = time.perf_counter() - start
        if turn >= warm_up:
            seconds.append(elapsed)
    return seconds, value


def _load(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    seconds, cells = timed(side.load, repeats=job["repeats"], warm_up=job.get("warm_up", 0))
    return {"seconds": seconds, "cells": cells}


def _augment(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    side.load()
    seconds, cells = timed(lambda: side.augment(job["minibatches"]), repeats=job["repeats"], warm_up=1)
    return {"seconds": seconds, "cells": cells}


def _loss(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    import torch

    z = torch.randn(2 * job["batch_size"], job["dim"], generator=torch.Generator().manual_seed(0))
    run = side.loss(z)
    before = memory_bytes("VmRSS")
    seconds, (loss, norm) = timed(run, repeats=job["repeats"], warm_up=1)
    return {
        "seconds": seconds,
        "cells": job["batch_size"],
        "loss": loss,
        "gradient_norm": norm,
        "growth_bytes": max(0, memory_bytes("VmHWM") - before),
    }


def _step(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    seconds, loss = timed(side.step(), repeats=job["repeats"], warm_up=job.get("warm_up", 1))
    return {"seconds": seconds, "cells": job["batch_size"], "loss": loss}


def _epoch(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    side.load()
    seconds, cells = timed(side.epoch, repeats=job["repeats"], warm_up=job.get("warm_up", 0))
    return {"seconds": seconds, "cells": cells}


def _embed(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    seconds, features = timed(side.embed, repeats=job["repeats"], warm_up=job.get("warm_up", 0))
    return {"seconds": seconds, "cells": len(features), "features": int(features.shape[1])}


def _score(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import pandas as pd

    features = np.load(job["features_file"], allow_pickle=False)
    metadata = pd.read_csv(job["metadata_file"])
    seconds, scores = timed(lambda: side.score(features, metadata), repeats=job["repeats"], warm_up=job.get("warm_up", 1))
    if agreed := job.get("agreed_features"):
        # Not timed. With fewer controls than features sphering leaves directions open, and every implementation has its own there.
        job["pictures"] = False
        scores = side.score(np.ascontiguousarray(features[:, :agreed]), metadata)
    return {"seconds": seconds, "cells": len(features), "nsc": scores[0], "nscb": scores[1]}


def _evaluate(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import pandas as pd

    profiles = np.load(job["features_file"], allow_pickle=False)
    run = side.evaluate(profiles, pd.read_csv(job["metadata_file"]))
    seconds, scores = timed(run, repeats=job["repeats"], warm_up=1)
    return {"seconds": seconds, "cells": len(profiles), "nsc": scores[0], "nscb": scores[1]}


def _end_to_end(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    import pandas as pd

    metadata = pd.read_csv(job["metadata_file"])
    parts: dict[str, float] = {}
    begin = time.perf_counter()

    def part(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = run()
        parts[name] = time.perf_counter() - start
        return value

    part("load", side.load)
    part("train", lambda: [side.epoch() for _ in range(job.get("epochs", 1))])
    features = part("embed", side.embed)
    scores = part("score", lambda: side.score(features, metadata))
    seconds = time.perf_counter() - begin
    return {"seconds": [seconds], "cells": len(features), "parts": parts, "nsc": scores[0], "nscb": scores[1]}


def _train(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    begin = time.perf_counter()
    side.load()
    loaded = time.perf_counter() - begin

    def finished(step: int) -> bool:
        if job.get("steps") is not None:
            return step >= job["steps"]
        return time.perf_counter() - begin >= job["wall_seconds"]

    steps, loss = side.train(finished)
    seconds = time.perf_counter() - begin
    features = side.embed()
    with open(job["features_file"], "wb") as handle:
        np.save(handle, features, allow_pickle=False)
    return {"seconds": [seconds], "load_seconds": loaded, "steps": steps, "cells": steps * job["batch_size"], "loss": loss}


def _agree(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    return side.agree()


PARTS = {
    "load": _load, "augment": _augment, "loss": _loss, "step": _step, "epoch": _epoch, "embed": _embed, "score": _score, "score with pictures": _score,
    "evaluate": _evaluate, "end to end": _end_to_end, "train": _train, "agree": _agree,
}  # fmt: skip


def implementation(job: dict[str, Any]) -> Any:
    """The job's implementation, from its file."""
    spec = importlib.util.spec_from_file_location("implementation", job["implementation"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["implementation"] = module
    spec.loader.exec_module(module)
    return module.Implementation(job)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Carry out a job; memory that runs out is a result, not a failure."""
    import torch

    torch.set_num_threads(job["threads"])
    side = implementation(job)
    imported = memory_bytes("VmRSS")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if job.get("allowed_bytes"):
        # Beyond this an allocation fails in this process, instead of the operating system choosing another one to end.
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes("VmSize") + job["allowed_bytes"], limits[1]))
    try:
        result = PARTS[job["part"]](side, job)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "memory" not in text.lower():
            raise
        result = {"out_of_memory": " ".join(text.split())[:200] or "MemoryError"}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    result["peak_bytes"] = memory_bytes("VmHWM")
    result["imported_bytes"] = imported
    result["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__, **side.versions()}
    return result


def start_peak_anew() -> bool:
    """Let ``VmHWM`` begin at the present size again, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def main() -> None:
    """For each line of standard input, a file ``{"result", "jobs": [job, …]}``: carry out its jobs, write the list of results where it says."""
    # This file's folder would otherwise come before everything else and lend its module names to the reference.
    sys.path[:] = [entry for entry in sys.path if entry and os.path.abspath(entry) != os.path.dirname(os.path.abspath(__file__))]
    # While the other side may be at work: libraries take seconds.
    import torch  # noqa: F401

    fresh = True
    while line := sys.stdin.readline():
        work = json.loads(Path(line.rstrip("\n")).read_text(encoding="utf-8"))
        results = []
        for job in work["jobs"]:
            if not fresh:
                gc.collect()
                start_peak_anew()
            fresh = False
            results.append(run(job))
        unfinished = Path(work["result"] + ".part")
        unfinished.write_text(json.dumps(results), encoding="utf-8")
        unfinished.replace(work["result"])


if __name__ == "__main__":
    main()

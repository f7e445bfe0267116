"""Measurements in a process of its own, so that peak memory is their own: ``python worker.py``, with names of job files on standard input.

It runs in the environment of a reference checkout too, where cellfast is not installed: it imports the standard library, NumPy, pandas
and PyTorch only. A job names the implementation's file and what to measure. An implementation is a class ``Implementation(job)`` with
``packages`` (names, for their versions) and these methods:

=======================  ====================================================================================================
``model()``              the encoder and its head, made once
``load()``               crops on disk → ready for ``minibatches``, every pixel read; returns the number of cells
``minibatches()``        one pass: (two views, number of cells) of each minibatch
``pair(a, b)``           two tensors of views [B, 3, s, s] as ``update`` takes them
``update(views)``        one training step; returns the loss
``nt_xent(z)``           loss of z [2N, D], rows i and i + N being one cell
``embed()``              features h float32 [cells, F] of all cells, in the index's order
``score(f, m)``          cells' features and metadata table → (NSC, NSCB)
``evaluate(f, m)``       treatments' profiles and metadata table → a callable that returns (NSC, NSCB)
``encoder_input(n)``     the first n crops without augmentation, as the encoder sees them
``encode(x)``            h of the encoder's input
=======================  ====================================================================================================

cellfast also has ``take_weights`` and ``takes_input`` for the comparison number by number.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[], dict[str, Any]]


def memory_bytes(name: str) -> int:
    """``VmHWM`` (peak), ``VmRSS`` (now) or ``VmSize`` of this process in bytes. (``ru_maxrss`` would begin with the parent's.)"""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_pass(side: Any, train: bool, most: int = -1) -> int:
    """Cells of at most ``most`` minibatches; −1: all."""
    cells = 0
    for number, (views, count) in enumerate(side.minibatches(), 1):
        if train:
            side.update(views)
        cells += count
        if number == most:
            break
    return cells


def tables(job: dict[str, Any]) -> tuple[Any, Any]:
    """The job's features and their metadata."""
    import numpy as np
    import pandas as pd

    return np.load(job["features_file"], allow_pickle=False), pd.read_csv(job["metadata_file"])


def scores(values: tuple[float, float]) -> dict[str, float]:
    """(NSC, NSCB) by name."""
    return {"nsc": values[0], "nscb": values[1]}


def prepared(side: Any, job: dict[str, Any]) -> Run:
    """What is timed of the job's part, everything it needs being there."""
    import torch

    part, count = job["part"], job["batch_size"]
    if part in ("augment", "epoch"):
        side.load()
    if part in ("step", "epoch"):
        side.model().train()
    if part in ("score", "score with pictures", "evaluate"):
        features, metadata = tables(job)
        if part == "evaluate":
            evaluate = side.evaluate(features, metadata)
            return lambda: {"cells": len(features), **scores(evaluate())}
        return lambda: {"cells": len(features), **scores(side.score(features, metadata))}
    if part == "step":
        shape = (count, 3, job["size"], job["size"])
        views = side.pair(torch.rand(shape), torch.rand(shape))
        return lambda: {"cells": count, "loss": side.update(views)}
    if part == "loss":
        z = torch.randn(2 * count, job["dim"], generator=torch.Generator().manual_seed(0))
        return lambda: loss_and_gradient(side, z)
    whole: dict[str, Run] = {
        "load": lambda: {"cells": side.load()},
        "augment": lambda: {"cells": one_pass(side, False, job.get("minibatches", -1))},
        "epoch": lambda: {"cells": one_pass(side, True)},
        "embed": lambda: dict(zip(("cells", "features"), side.embed().shape)),
        "end to end": lambda: end_to_end(side, job),
        "train": lambda: train(side, job),
        "agree": lambda: agree(side, job),
    }
    return whole[part]


def loss_and_gradient(side: Any, z: Any) -> dict[str, Any]:
    """Forward and backward of NT-Xent."""
    leaf = z.clone().requires_grad_()
    loss = side.nt_xent(leaf)
    loss.backward()
    return {"cells": len(z) // 2, "loss": float(loss.detach()), "gradient_norm": float(leaf.grad.norm())}


def end_to_end(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Crops on disk to NSC and NSCB."""
    import pandas as pd

    side.load()
    side.model().train()
    for _ in range(job["epochs"]):
        one_pass(side, True)
    features = side.embed()
    return {"cells": len(features), **scores(side.score(features, pd.read_csv(job["metadata_file"])))}


def train(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Load, and train for the job's number of steps."""
    side.load()
    side.model().train()
    step, loss = 0, None
    while step < job["steps"]:
        for views, _ in side.minibatches():
            loss = side.update(views)
            step += 1
            if step == job["steps"]:
                break
    return {"cells": step * job["batch_size"], "steps": step, "loss": loss}


def agree(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Losses of a few steps on fixed views, the crops and their mirror images. The other side comes first and writes its weights and input."""
    import numpy as np
    import torch

    first, double, found = side.encoder_input(job["batch_size"]), job["double"], {}
    if hasattr(side, "take_weights"):
        theirs = torch.from_numpy(np.load(job["inputs"], allow_pickle=False))
        side.take_weights(torch.load(job["weights"], weights_only=True))
        found["largest_input_difference"] = float((side.takes_input(first) - theirs).abs().max())
        if double:
            # Adam's first steps make much of rounding: in float64, from the very same input, only the method is compared.
            side.model().input_transform, first = torch.nn.Identity(), theirs
    else:
        torch.save({key: value.clone() for key, value in side.model().state_dict().items()}, job["weights"])
        np.save(job["inputs"], first.numpy(), allow_pickle=False)
    if double:
        side.model().double()
        first = first.double()
    side.model().train()
    views = side.pair(first, first.flip(3))
    losses = [side.update(views) for _ in range(job["steps"])]
    side.model().eval()
    with torch.no_grad():
        return {"cells": len(first), "losses": losses, "features": side.encode(first).flatten()[:64].tolist(), **found}


def measure(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Prepare, warm up, and time every repeat; the result is the last one's."""
    run, warm_up = prepared(side, job), job.get("warm_up", 0)
    before, seconds, found = memory_bytes("VmRSS"), [], {}
    for turn in range(warm_up + job.get("repeats", 1)):
        gc.collect()
        start = time.perf_counter()
        found = run()
        if turn >= warm_up:
            seconds.append(time.perf_counter() - start)
    found["seconds"] = seconds
    if job["part"] == "loss":
        found["growth_bytes"] = max(0, memory_bytes("VmHWM") - before)
    if job["part"].startswith("score"):
        # Not timed. With fewer controls than features sphering leaves directions open, and every implementation has its own there.
        features, metadata = tables(job)
        job["pictures"] = False
        found |= scores(side.score(features[:, : job["agreed_features"]].copy(), metadata))
    if job["part"] == "train":
        import numpy as np

        np.save(job["features_file"], side.embed(), allow_pickle=False)
    return found


def carry_out(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job; memory that runs out is a result, not a failure."""
    import torch

    torch.set_num_threads(job["threads"])
    spec = importlib.util.spec_from_file_location("implementation", job["implementation"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["implementation"] = module
    spec.loader.exec_module(module)
    side = module.Implementation(job)
    imported, limits = memory_bytes("VmRSS"), resource.getrlimit(resource.RLIMIT_AS)
    if job.get("allowed_bytes"):
        # Beyond this an allocation fails in this process, instead of the operating system choosing another one to end.
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes("VmSize") + job["allowed_bytes"], limits[1]))
    try:
        result = measure(side, job)
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and "memory" not in text.lower():
            raise
        result = {"out_of_memory": text[:200] or "MemoryError"}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in side.packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**result, "peak_bytes": memory_bytes("VmHWM"), "imported_bytes": imported, "versions": versions}


def main() -> None:
    """Carry out the job file named by each line of standard input, and write its result where it says."""
    # This file's folder would otherwise come before everything else and lend its module names to the reference.
    sys.path[:] = [entry for entry in sys.path if entry and os.path.abspath(entry) != os.path.dirname(os.path.abspath(__file__))]
    # While the other side may be at work: libraries take seconds.
    import torch  # noqa: F401

    while line := sys.stdin.readline():
        job = json.loads(Path(line.rstrip("\n")).read_text(encoding="utf-8"))
        text = json.dumps(carry_out(job))
        unfinished = Path(job["result"] + ".part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(job["result"])
        gc.collect()
        try:
            # The next job's peak begins at what this one left, where the kernel allows it.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            pass


if __name__ == "__main__":
    main()

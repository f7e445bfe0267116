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


def _load(side: Any, job: dict[str, Any]) -> Run:
    return lambda: {"cells": side.load()}


def _augment(side: Any, job: dict[str, Any]) -> Run:
    side.load()
    return lambda: {"cells": one_pass(side, False, job.get("minibatches", -1))}


def _loss(side: Any, job: dict[str, Any]) -> Run:
    import torch

    z = torch.randn(2 * job["batch_size"], job["dim"], generator=torch.Generator().manual_seed(0))

    def run() -> dict[str, Any]:
        leaf = z.clone().requires_grad_()
        loss = side.nt_xent(leaf)
        loss.backward()
        return {"cells": job["batch_size"], "loss": float(loss.detach()), "gradient_norm": float(leaf.grad.norm())}

    return run


def _step(side: Any, job: dict[str, Any]) -> Run:
    import torch

    shape = (job["batch_size"], 3, job["size"], job["size"])
    views = side.pair(torch.rand(shape), torch.rand(shape))
    side.model().train()
    return lambda: {"cells": job["batch_size"], "loss": side.update(views)}


def _epoch(side: Any, job: dict[str, Any]) -> Run:
    side.load()
    side.model().train()
    return lambda: {"cells": one_pass(side, True)}


def _embed(side: Any, job: dict[str, Any]) -> Run:
    def run() -> dict[str, Any]:
        features = side.embed()
        return {"cells": len(features), "features": features.shape[1]}

    return run


def _tables(job: dict[str, Any]) -> tuple[Any, Any]:
    import numpy as np
    import pandas as pd

    return np.load(job["features_file"], allow_pickle=False), pd.read_csv(job["metadata_file"])


def _score(side: Any, job: dict[str, Any]) -> Run:
    features, metadata = _tables(job)
    return lambda: {"cells": len(features), **_scores(side.score(features, metadata))}


def _evaluate(side: Any, job: dict[str, Any]) -> Run:
    profiles, metadata = _tables(job)
    evaluate = side.evaluate(profiles, metadata)
    return lambda: {"cells": len(profiles), **_scores(evaluate())}


def _scores(values: tuple[float, float]) -> dict[str, float]:
    return {"nsc": values[0], "nscb": values[1]}


def _end_to_end(side: Any, job: dict[str, Any]) -> Run:
    import pandas as pd

    metadata = pd.read_csv(job["metadata_file"])
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = run()
        seconds[name] = time.perf_counter() - start
        return value

    def train() -> None:
        side.model().train()
        for _ in range(job["epochs"]):
            one_pass(side, True)

    def run() -> dict[str, Any]:
        timed("load", side.load)
        timed("train", train)
        features = timed("embed", side.embed)
        scores = timed("score", lambda: side.score(features, metadata))
        return {"cells": len(features), "parts": seconds, **_scores(scores)}

    return run


def _train(side: Any, job: dict[str, Any]) -> Run:
    def run() -> dict[str, Any]:
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

    return run


def _agree(side: Any, job: dict[str, Any]) -> Run:
    """Losses of a few steps on fixed views, the crops and their mirror images. The other side comes first and writes its weights and input."""
    import numpy as np
    import torch

    def run() -> dict[str, Any]:
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

    return run


MEASURES: dict[str, Callable[[Any, dict[str, Any]], Run]] = {
    "load": _load, "augment": _augment, "loss": _loss, "step": _step, "epoch": _epoch, "embed": _embed, "score": _score,
    "score with pictures": _score, "evaluate": _evaluate, "end to end": _end_to_end, "train": _train, "agree": _agree,
}  # fmt: skip


def measure(side: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Prepare, warm up, and time every repeat; the result is the last one's."""
    run = MEASURES[job["part"]](side, job)
    before, seconds, found = memory_bytes("VmRSS"), [], {}
    for turn in range(job.get("warm_up", 0) + job.get("repeats", 1)):
        gc.collect()
        start = time.perf_counter()
        found = run()
        if turn >= job.get("warm_up", 0):
            seconds.append(time.perf_counter() - start)
    found["seconds"] = seconds
    if job["part"] == "loss":
        found["growth_bytes"] = max(0, memory_bytes("VmHWM") - before)
    if job["part"].startswith("score"):
        # Not timed. With fewer controls than features sphering leaves directions open, and every implementation has its own there.
        features, metadata = _tables(job)
        job["pictures"] = False
        found |= _scores(side.score(features[:, : job["agreed_features"]].copy(), metadata))
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

"""Embedding with Ray Data: fields are read by tasks on the cluster's CPUs, a pool of actors holds the encoder; lost work is done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cellfast.embedding.blocks import PartFiles, PartWork
from cellfast.embedding.cells import CellSource, Chunk, Part, PlatePlan
from cellfast.embedding.encoder import CropEncoder
from cellfast.embedding.options import EmbedOptions
from cellfast.embedding.progress import EmbedProgress
from cellfast.errors import CellfastError


def embed_with_ray(
    source: CellSource,
    encoder: CropEncoder,
    parts: PartFiles,
    todo: list[Part],
    plan_of: dict[str, PlatePlan],
    options: EmbedOptions,
    written: Callable[[Part], None],
    progress: EmbedProgress,
) -> None:
    """Embed the parts ``todo`` on a Ray cluster (the running one, ``RAY_ADDRESS``, or one started on this machine).

    A part is the unit: a task reads and cuts it, an actor embeds it and writes its file. Ray repeats tasks whose worker or machine died;
    a part that was written already is simply written again, the same. Images, locations, model and output must be reachable from every
    machine (a shared disk or URLs).

    Args:
        written: called here for each part whose file is there.

    Raises:
        CellfastError: Ray is not installed, or a task failed for a reason the user can mend.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CellfastError("--engine ray needs the package ray: pip install 'cellfast[ray]'") from error
    if not todo:
        return
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        cuda = encoder.device.type == "cuda"
        resources = ray.cluster_resources()
        actors = max(1, int(resources.get("GPU", 0))) if cuda else max(1, int(resources.get("CPU", 1)) // 2)
        shared = ray.put(
            {"source": source, "parts": parts, "plans": plan_of, "options": options, "encoder": _recipe(encoder, options)}
        )
        items = [{"plate": part.plate, "start": part.start, "stop": part.stop} for part in todo]
        data = ray.data.from_items(items, override_num_blocks=len(items))
        readers = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(resources.get("CPU", 1))))
        # Actors that died are started again, and what they had under way is given to others.
        lasting = {"max_restarts": -1, "max_task_retries": 3}
        data = data.map_batches(_ReadParts, fn_constructor_args=(shared,), batch_size=1, compute=readers, num_cpus=1, **lasting)
        data = data.map_batches(
            _EncodeParts,
            fn_constructor_args=(shared,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=0 if cuda else 1,
            num_gpus=1 if cuda else 0,
            **lasting,
        )
        done: set[Part] = set()
        for row in data.iter_rows():
            part = Part(str(row["plate"]), int(row["start"]), int(row["stop"]))
            if row["error"]:
                raise CellfastError(str(row["error"]))
            if row["smaller"]:
                progress.message(f"embed: out of memory; an encoder goes on with {int(row['smaller'])} cells at a time")
            if part not in done:
                done.add(part)
                progress.advance(int(row["cells"]), int(row["fields"]))
                written(part)
        missing = [part for part in todo if part not in done]
        if missing:
            raise CellfastError(f"Ray lost {len(missing)} of {len(todo)} parts; run the same command again")
    finally:
        if started_here:
            ray.shutdown()


def _recipe(encoder: CropEncoder, options: EmbedOptions) -> dict[str, Any]:
    """What an actor makes its encoder from: the model travels through Ray's object store, once per machine."""
    model = replace(encoder.loaded, model=encoder.network.to("cpu"))
    return {
        "model": model,
        "features": encoder.features,
        "device": "cuda" if encoder.device.type == "cuda" else "cpu",
        "amp": encoder.amp,
        "tta": encoder.tta,
        "compile": encoder.compiled,
        "batch_size": options.batch_size,
    }


class _ReadParts:
    """Reads and cuts a part; runs on a CPU of the cluster."""

    def __init__(self, shared: Any) -> None:
        import ray

        self.source: CellSource = ray.get(shared)["source"]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        part = _part_of(batch)
        try:
            chunks = [_cut(self.source.read(unit)) for unit in self.source.units(part)]
            return {**_ids(part), "chunks": _boxed(chunks), "error": np.array([""], dtype=object)}
        except CellfastError as error:
            return {**_ids(part), "chunks": _boxed([]), "error": np.array([str(error)], dtype=object)}


class _EncodeParts:
    """Embeds a part and writes its file; holds the encoder."""

    def __init__(self, shared: Any) -> None:
        import ray

        told = ray.get(shared)
        recipe = dict(told["encoder"])
        self.source, self.parts, self.plans, self.options = told["source"], told["parts"], told["plans"], told["options"]
        self.encoder = CropEncoder(recipe.pop("model"), **{**recipe, "device": torch.device(recipe["device"])})
        self.shrunk = 0
        self.encoder.on_shrink = lambda old, new: setattr(self, "shrunk", new)
        self.scaling: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        part, error = _part_of(batch), str(batch["error"][0])
        work, fields, self.shrunk = PartWork(part), 0, 0
        if not error:
            try:
                pieces = []
                for chunk in _unboxed(batch["chunks"]):
                    work.add(chunk)
                    fields += chunk.fields
                    if chunk.count:
                        pieces.append(chunk.crops)
                if pieces:
                    # The minibatches of the other engine: they run across the fields of a part.
                    crops, (low, high) = torch.from_numpy(np.concatenate(pieces)), self._scaling(part.plate)
                    for some in crops.split(self.options.batch_size):
                        work.values.append(self.encoder(some, low, high).numpy())
                self.parts.write(self.plans[part.plate], work)
            except CellfastError as failed:
                error = str(failed)
        return {
            **_ids(part),
            "cells": np.array([work.cells]),
            "fields": np.array([fields]),
            "smaller": np.array([self.shrunk]),
            "error": np.array([error], dtype=object),
        }

    def _scaling(self, plate: str) -> tuple[torch.Tensor, torch.Tensor]:
        if self.encoder.loaded.scaling != "plate":
            return self.encoder.loaded.low, self.encoder.loaded.high
        if plate not in self.scaling:
            low, high = (torch.tensor(v, dtype=torch.float32) for v in self.source.plate_scaling(plate))
            self.scaling = {plate: (low, high)}
        return self.scaling[plate]


def _cut(chunk: Chunk) -> Chunk:
    """The chunk with its crops cut and without its planes: the smaller of the two to send."""
    if chunk.planes is not None:
        out = np.empty((chunk.count, len(chunk.planes), chunk.size, chunk.size), dtype=chunk.planes[0].dtype)
        chunk.fill(out, 0, chunk.count)
        chunk.crops, chunk.planes, chunk.origins = out, None, None
    return chunk


def _part_of(batch: dict[str, np.ndarray]) -> Part:
    return Part(str(batch["plate"][0]), int(batch["start"][0]), int(batch["stop"][0]))


def _ids(part: Part) -> dict[str, np.ndarray]:
    return {"plate": np.array([part.plate], dtype=object), "start": np.array([part.start]), "stop": np.array([part.stop])}


def _boxed(chunks: list[Chunk]) -> np.ndarray:
    box = np.empty(1, dtype=object)
    box[0] = chunks
    return box


def _unboxed(box: np.ndarray) -> Iterator[Chunk]:
    yield from box[0]

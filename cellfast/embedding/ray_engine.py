"""Embedding with Ray Data: fields are read by tasks on the cluster's CPUs, a pool of actors holds the encoder; lost work is done
again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cellfast.embedding.blocks import BlockFiles, BlockWork
from cellfast.embedding.cells import Block, CellSource, PlatePlan
from cellfast.embedding.encoder import CropEncoder, plate_scaling
from cellfast.embedding.progress import EmbedProgress
from cellfast.errors import CellfastError, option
from cellfast.model_file import LoadedModel


@dataclass
class _Task:
    """What every actor needs; it travels through Ray's object store, once per machine."""

    source: CellSource
    blocks: BlockFiles
    plan_of: dict[str, PlatePlan]
    model: LoadedModel
    device: str


def embed_with_ray(
    source: CellSource,
    encoder: CropEncoder,
    blocks: BlockFiles,
    todo: list[Block],
    plan_of: dict[str, PlatePlan],
    written: Callable[[Block], None],
    progress: EmbedProgress,
) -> None:
    """Embed the blocks ``todo`` on a Ray cluster (the running one, ``RAY_ADDRESS``, or one started on this machine).

    A task reads and cuts a block, an actor embeds it and writes its file. Ray repeats tasks whose worker or machine died; a block
    that was written already is simply written again, the same. Images, locations, model and output must be reachable from every
    machine (a shared disk or URLs).

    Args:
        written: called here for each block whose file is there.

    Raises:
        CellfastError: Ray is not installed, or a task failed for a reason the user can mend.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CellfastError(f"{option('engine', 'ray')} needs the package ray: pip install 'cellfast[ray]'") from error
    if not todo:
        return
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        cuda = encoder.device.type == "cuda"
        resources = ray.cluster_resources()
        cpus = max(1, int(resources.get("CPU", 1)))
        actors = max(1, int(resources.get("GPU", 0))) if cuda else max(1, cpus // 2)
        model = replace(encoder.loaded, model=encoder.network.to("cpu"))
        task = ray.put(_Task(source, blocks, plan_of, model, encoder.device.type))
        data = ray.data.from_items([vars(block) for block in todo], override_num_blocks=len(todo))
        # Actors that died are started again, and what they had under way is given to others.
        lasting = {"fn_constructor_args": (task,), "batch_size": 1, "max_restarts": -1, "max_task_retries": 3}
        readers, encoders = ray.data.ActorPoolStrategy(min_size=1, max_size=cpus), ray.data.ActorPoolStrategy(size=actors)
        data = data.map_batches(_ReadBlock, compute=readers, num_cpus=1, **lasting)
        data = data.map_batches(_EncodeBlock, compute=encoders, num_cpus=0 if cuda else 1, num_gpus=1 if cuda else 0, **lasting)
        done: set[Block] = set()
        for row in data.iter_rows():
            block = Block(str(row["plate"]), int(row["start"]), int(row["stop"]))
            if row["error"]:
                raise CellfastError(str(row["error"]))
            if row["smaller"]:
                progress.message(f"embed: out of memory; an encoder goes on with {int(row['smaller'])} cells at a time")
            if block not in done:
                done.add(block)
                progress.advance(int(row["cells"]), int(row["fields"]))
                written(block)
        if missing := len(todo) - len(done):
            raise CellfastError(f"Ray lost {missing} of {len(todo)} blocks; run the same command again")
    finally:
        if started_here:
            ray.shutdown()


class _ReadBlock:
    """Reads and cuts a block; runs on a CPU of the cluster."""

    def __init__(self, task: Any) -> None:
        import ray

        self.source: CellSource = ray.get(task).source

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        block, cells, error = _block_of(batch), [], ""
        try:
            cells = [self.source.read(unit).cut() for unit in self.source.units(block)]
        except CellfastError as failed:
            error = str(failed)
        return _row(block, read=cells, error=error)


class _EncodeBlock:
    """Embeds a block and writes its file; holds the encoder."""

    def __init__(self, task: Any) -> None:
        import ray

        told: _Task = ray.get(task)
        self.blocks, self.plan_of, self.options = told.blocks, told.plan_of, told.blocks.options
        self.encoder = CropEncoder(told.model, device=torch.device(told.device), **self.options.for_encoder())
        self.scaling = plate_scaling(told.model, told.source)
        self.shrunk = 0
        self.encoder.on_shrink = lambda old, new: setattr(self, "shrunk", new)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        block, error = _block_of(batch), str(batch["error"][0])
        work, fields, self.shrunk = BlockWork(block), 0, 0
        if not error:
            try:
                crops = []
                for cells in batch["read"][0]:
                    work.add(cells)
                    fields += cells.fields
                    if cells.count:
                        crops.append(cells.crops)
                if crops:
                    low, high = self.scaling(block.plate)
                    # The minibatches of the other engine: they run across the fields of a block.
                    for some in torch.from_numpy(np.concatenate(crops)).split(self.options.batch_size):
                        work.values.append(self.encoder(some, low, high).numpy())
                self.blocks.write(self.plan_of[block.plate], work)
            except CellfastError as failed:
                error = str(failed)
        return _row(block, cells=work.count, fields=fields, smaller=self.shrunk, error=error)


def _block_of(batch: dict[str, np.ndarray]) -> Block:
    return Block(str(batch["plate"][0]), int(batch["start"][0]), int(batch["stop"][0]))


def _row(block: Block, **values: Any) -> dict[str, np.ndarray]:
    """A row for the next stage, in Ray's form: an array of one value per column."""
    row = {}
    for name, value in {**vars(block), **values}.items():
        row[name] = np.empty(1, np.int64 if isinstance(value, int) else object)
        row[name][0] = value
    return row

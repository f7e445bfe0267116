"""Contrastive training of an encoder on a screen's cells, from the first minibatch or from a checkpoint."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from cellfast.augment import AugmentConfig, TwoViews
from cellfast.data import Loader
from cellfast.data.malloc import tune_malloc
from cellfast.errors import CellfastError, option
from cellfast.losses import NTXentLoss
from cellfast.model_file import ModelMetadata, load_weights, save_model
from cellfast.models import ModelConfig, build_model
from cellfast.printable import Shown
from cellfast.progress import Progress
from cellfast.screens import Screen
from cellfast.training.checkpoint import load_checkpoint, restore, save_checkpoint
from cellfast.training.config import TrainConfig, automatic_output_size
from cellfast.training.cuda_graph import GraphedStep
from cellfast.training.devices import amp_warning, choose_device
from cellfast.training.distributed import Processes, start_processes, synchronise_gradients
from cellfast.training.losses_seen import LossReader
from cellfast.training.optimizers import build_optimizer, set_learning_rate
from cellfast.training.provenance import source_commit
from cellfast.training.run_folder import MetricsLog, RunFolder
from cellfast.training.scaling import PlateScaling
from cellfast.training.schedule import learning_rate_factor
from cellfast.training.split import data_digest, split_cells
from cellfast.training.step import TrainingStep, TwoViewModel, views_seed
from cellfast.training.validation import Validation


@dataclass(repr=False)
class TrainResult(Shown):
    """How a training ended; as a path it is the run folder."""

    steps: int
    interrupted: bool
    model: Path
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    cells_per_second: float | None = None

    def __fspath__(self) -> str:
        return str(self.model.parent)

    def __str__(self) -> str:
        end = f"stopped at step {self.steps}" if self.interrupted else f"{self.steps} steps"
        parts = [f"run {self.model.parent}: {end}"]
        parts += [f"loss {self.loss:.4g}"] if self.loss is not None else []
        parts += [f"{name} {value:.4g}" for name, value in self.validation.items()]
        parts += [f"{self.cells_per_second:,.0f} cells/s"] if self.cells_per_second else []
        return ", ".join(parts)


def train(
    screen_path: str | Path,
    run: str | Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    force: bool = False,
    allow_unfinished: bool = False,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Train an encoder on a screen and write the run folder.

    With ``torchrun`` every process calls this with the same arguments; the loss then is over the global minibatch and rank 0
    writes.

    Args:
        screen_path: a screen folder.
        run: the run folder.
        config: every value of the run.
        resume: go on from the run's last whole checkpoint, on a CPU bit-identically to a run that had not stopped; from the
            beginning where there is none yet.
        force: discard a run that is in the folder.
        allow_unfinished: take the plates that are there of a screen whose ingest has not ended.
        say: prints a line.

    Raises:
        CellfastError: options and data that do not fit, a run in the way, another training in the folder, a loss that is not
            finite, out of memory, a full disk, another process of the training that ended or hangs.
    """
    device = choose_device(config.device)
    tune_malloc()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # minibatches have one shape
    if config.threads:
        torch.set_num_threads(config.threads)
    processes = start_processes(device)
    folder = RunFolder(Path(run))
    try:
        # All read the checkpoint that one process has chosen.
        checkpoint, note = processes.first_does(lambda: folder.take(resume=resume, force=force))
        return _Training(Path(screen_path), folder, config, device, processes, checkpoint, note, allow_unfinished, say).run()
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(f" on {device}", config) from error
    except RuntimeError as error:
        if "not enough memory" in str(error) or "can't allocate memory" in str(error):
            raise _out_of_memory("", config) from error
        lost = processes.lost(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        folder.release()
        processes.stop()


def _out_of_memory(where: str, config: TrainConfig) -> CellfastError:
    return CellfastError(
        f"out of memory{where}: use a smaller {option('batch_size')} (now {config.batch_size}), {option('output_size')} or "
        f"{option('encoder')}, or {option('chunk_size')} to encode it in pieces"
    )


class _Training:
    """One call of `train`: the parts it is made of, and the loop over them."""

    def __init__(
        self,
        screen_path: Path,
        folder: RunFolder,
        config: TrainConfig,
        device: torch.device,
        processes: Processes,
        checkpoint: Path | None,
        note: str,
        allow_unfinished: bool,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.device, self.processes, self.folder = config, device, processes, folder
        self.say = say if processes.is_first else (lambda text: None)
        self.screen = screen = Screen.open(screen_path, allow_unfinished=allow_unfinished)
        if screen.unfinished:
            self.say(f"{screen_path}: {screen.unfinished}")
        world = processes.world_size
        if config.batch_size % world:
            raise CellfastError(f"batch_size {config.batch_size} must be a multiple of the {world} processes")
        self.split = split_cells(
            screen.metadata(),
            method=config.validation,
            fraction=config.validation_fraction,
            seed=config.seed,
            plates=config.plates,
            hold_out_plates=config.hold_out_plates,
        )
        self.total_is_zero = config.steps == 0 or (config.steps is None and config.epochs == 0)
        if len(self.split.training) < config.batch_size and not self.total_is_zero:
            raise CellfastError(
                f"{screen_path}: {len(self.split.training)} cells to train on are fewer than one minibatch of "
                f"{config.batch_size}; use a smaller {option('batch_size')}, or more cells"
            )
        self.output_size = config.output_size or automatic_output_size(screen.crop_size)
        augment = dict(config.augment)
        self.two_views = TwoViews(
            AugmentConfig.preset(augment.pop("preset"), **augment),
            len(screen.channel_names),
            screen.crop_size,
            self.output_size,
            memory_format=torch.channels_last,
        )
        self.scaling = PlateScaling(screen, config.scaling)
        self.model = build_model(
            ModelConfig(
                encoder=config.encoder,
                num_channels=len(screen.channel_names),
                stem=config.stem,
                projection_dim=config.projection_dim,
                projection_layers=config.projection_layers,
                projection_hidden=config.projection_hidden,
                projection_batch_norm=config.projection_batch_norm,
                input_transform=config.input_transform,
            ),
            config.seed,
        )
        if config.weights and checkpoint is None:
            self.say(f"weights: {load_weights(self.model, config.weights)}")
        self.model = self.model.to(device)
        self.digest = data_digest(screen)
        self.optimizer = build_optimizer(
            self.model, config.optimizer, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
        self.loader = None if self.total_is_zero else self._make_loader()
        # Last: an earlier run is discarded only when nothing else stands in the way of this one.
        if processes.is_first and checkpoint is None:
            folder.clear()
        self.steps_per_epoch = len(self.loader) if self.loader else 0
        self.total_steps = config.steps if config.steps is not None else config.epochs * self.steps_per_epoch
        if note:
            self.say(note)
        self.first_step = 0 if checkpoint is None else self._resume(checkpoint)
        if processes.is_first:
            config.save(folder.config)
        self.interrupted, self._interrupted_at, self._one_is_gone = False, 0.0, False

    def _make_loader(self) -> Loader:
        return Loader(
            self.screen,
            self.config.batch_size // self.processes.world_size,
            rows=self.split.training,
            shuffle=True,
            seed=self.config.seed,
            drop_last=True,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            backend=self.config.loader,
            device=self.device,
            feed=self.config.feed,
        )

    def _resume(self, checkpoint: Path) -> int:
        content = load_checkpoint(checkpoint)
        if content["training_data"] != self.digest:
            raise CellfastError(
                f"{self.folder.path}: the run was trained on another screen (data digest {content['training_data'][:12]}, "
                f"{self.screen.path} has {self.digest[:12]}); resume with the screen it began with"
            )
        step = restore(content, self.model, self.optimizer, self.config.to_dict(), checkpoint)
        if self.loader is not None:
            self.loader.load_state_dict(content["loader"])
        self.say(f"resumed at step {step} of {self.total_steps}")
        return step

    def run(self) -> TrainResult:
        config = self.config
        self.say(f"{self.screen.path}: {self.split.description}")
        self.say(
            f"{config.encoder} (stem {config.stem}), {self.output_size} px, {', '.join(self.screen.channel_names)}; "
            f"{self.device}, {'bfloat16 autocast' if config.amp else 'float32'}, {self.processes.world_size} process(es), "
            f"{torch.get_num_threads()} threads"
        )
        if config.amp and (warning := amp_warning(self.device)):
            self.say(warning)
        if self.loader is not None:
            for note in self.loader.notes:
                self.say(note)
        if config.chunk_size is not None:
            self.say(
                f"gradient caching: pieces of at most {config.chunk_size} cells per process; BatchNorm sees one piece at a time"
            )
        if self.total_is_zero:
            self._save_model(0)
            start = f"holds the weights of {config.weights} as they are" if config.weights else "is randomly initialised"
            self.say(f"no steps asked for: {self.folder.model} {start}")
            return TrainResult(0, False, self.folder.model)
        loader = self.loader
        assert loader is not None
        module: torch.nn.Module = TwoViewModel(self.model, config.batch_norm == "per-view")
        if config.compile:
            module = cast(torch.nn.Module, torch.compile(module))
        module = synchronise_gradients(module, self.processes, self.device)
        self.losses = LossReader(self.device)
        self.step = (GraphedStep if config.cuda_graphs else TrainingStep)(
            module,
            NTXentLoss(config.temperature).to(self.device),
            self.optimizer,
            device=self.device,
            amp=config.amp,
            clip_grad_norm=config.clip_grad_norm,
            chunk_size=config.chunk_size,
        )
        self.validation = None
        if self.processes.is_first and len(self.split.validation) > 1:
            self.validation = Validation(
                self.screen,
                self.split.validation,
                self.two_views,
                self.scaling,
                batch_size=config.batch_size,
                temperature=config.temperature,
                most=config.validation_cells,
                seed=config.seed,
                device=self.device,
                amp=config.amp,
                chunk_size=config.chunk_size,
            )
        log = MetricsLog(self.folder, enabled=self.processes.is_first, step=self.first_step)
        old = {}
        if threading.current_thread() is threading.main_thread():
            # SIGTERM is how clusters and torchrun ask a process to end.
            old = {number: signal.signal(number, self._on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._loop(log, loader)
        except RuntimeError as error:
            # torchrun ends all processes when one is gone; this one is to say so first.
            if self.processes.lost(error):
                old = {}
                self._one_is_gone = True
            raise
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            # What exchanges gradients must not outlive the process group.
            del module, self.step
            log.close()
            loader.close()

    def _on_interrupt(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._one_is_gone:
            return
        if self.interrupted:
            # torchrun passes on a Ctrl-C that the terminal has sent to every process already.
            if now - self._interrupted_at < 2.0:
                return
            raise KeyboardInterrupt
        self.interrupted, self._interrupted_at = True, now
        if self.processes.is_first:
            sys.stderr.write("\ninterrupted: saving after this step (once more to stop at once)\n")

    def _loop(self, log: MetricsLog, loader: Loader) -> TrainResult:
        config, result = self.config, TrainResult(self.first_step, False, self.folder.model)
        total_cells = (self.total_steps - self.first_step) * config.batch_size
        step, began, cells = self.first_step, time.monotonic(), 0
        self.model.train()
        with Progress("train", total_cells, "cells", enabled=self.processes.is_first) as progress:
            while step < self.total_steps:
                for batch in loader:
                    factor = learning_rate_factor(
                        step,
                        total_steps=self.total_steps,
                        steps_per_epoch=self.steps_per_epoch,
                        schedule=config.schedule,
                        warmup=config.warmup,
                        final=config.final_lr,
                    )
                    set_learning_rate(self.optimizer, config.lr * factor)
                    low, high = self.scaling.on(batch.rows, self.device)
                    views = self.step.views(
                        self.two_views, batch.crops, low, high, seed=views_seed(config.seed, step, self.processes.rank)
                    )
                    loss = self.step.compute_loss(views)
                    self._look(self.losses.put(step, loss), result)
                    self.step.update(loss)
                    step += 1
                    cells += config.batch_size
                    progress.advance(config.batch_size, f"loss {result.loss:.4f}" if result.loss is not None else None)
                    if step == self.total_steps:
                        self._look(self.losses.drain(), result)
                    if step % config.log_every == 0 or step == self.total_steps:
                        result.cells_per_second = cells / (time.monotonic() - began)
                        log.write(step, loss=result.loss, lr=config.lr * factor, cells_per_second=result.cells_per_second)
                    ends = step % self.steps_per_epoch == 0 or step == self.total_steps
                    if ends and (step == self.total_steps or (step // self.steps_per_epoch) % config.validate_every == 0):
                        result.validation = self._validate(log, step, progress) or result.validation
                    stop = self.processes.any(self.interrupted)
                    if ends or stop or step % config.checkpoint_every == 0:
                        self._look(self.losses.drain(), result)
                        self._save(step)
                    if stop or step == self.total_steps:
                        break
                if self.processes.any(self.interrupted):
                    result.interrupted = True
                    break
        result.steps = step
        return result

    def _look(self, losses: list[tuple[int, float]], result: TrainResult) -> None:
        for step, loss in losses:
            result.loss = loss
            if not math.isfinite(loss):
                self._not_finite(f"the loss is {loss} at step {step + 1}")

    def _not_finite(self, what: str) -> None:
        kept = f"; the last good state is in {self.folder.checkpoint}" if self.folder.checkpoint.exists() else ""
        raise CellfastError(
            f"{what}{kept}. Try a smaller {option('lr')} (now {self.config.lr:g}), a longer {option('warmup')} (now "
            f"{self.config.warmup:g}), a higher {option('temperature')} (now {self.config.temperature:g}), "
            f"{option('clip_grad_norm', 1)}, or float32 (no {option('amp')})"
        )

    def _validate(self, log: MetricsLog, step: int, progress: Progress) -> dict[str, float]:
        if self.validation is None:
            return {}
        found = self.validation.measure(self.model)
        measured = {"validation_loss": found.loss, "retrieval": found.retrieval, "retrieval_chance": found.chance}
        values = {key: value for key, value in measured.items() if value is not None and math.isfinite(value)}
        log.write(step, **values)
        text = f"step {step}: validation loss {found.loss:.4f} ({len(self.validation)} cells)"
        if found.retrieval is not None and found.chance is not None:
            text += f", same treatment nearest in another well {100 * found.retrieval:.1f} % (chance {100 * found.chance:.1f} %)"
        progress.message(text)
        return values

    def _save(self, step: int) -> None:
        # The loss of this step was finite; its gradient need not have been, and the last good checkpoint must outlive it.
        if not all(bool(torch.isfinite(weight).all()) for weight in self.model.parameters()):
            self._not_finite(f"the weights are not finite after step {step}")
        if not self.processes.is_first:
            return
        assert self.loader is not None
        save_checkpoint(
            self.folder.checkpoint,
            step=step,
            model=self.model,
            optimizer=self.optimizer,
            loader_state=self.loader.state_dict(),
            config=self.config.to_dict(),
            training_data=self.digest,
        )
        self._save_model(step)

    def _save_model(self, step: int) -> None:
        if not self.processes.is_first:
            return
        screen = self.screen
        save_model(
            self.folder.model,
            self.model,
            ModelMetadata(
                channel_names=list(screen.channel_names),
                crop_size=screen.crop_size,
                output_size=self.output_size,
                bits=8 * np.dtype(screen.dtype).itemsize,
                # How the scaling was chosen does not matter to who uses it.
                scaling="plate" if self.config.scaling == "plate" else "screen",
                low=self.scaling.low.tolist(),
                high=self.scaling.high.tolist(),
                training_data=self.digest if step else "",
                step=step,
                git_commit=source_commit(),
            ),
        )

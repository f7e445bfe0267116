"""The demonstration: a list of ``cellfast`` commands, run one after the other, remembered when done."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellfast import __version__
from cellfast.atomic import write_json
from cellfast.errors import CellfastError


@dataclass(frozen=True)
class Step:
    """One command of the demonstration and the file that exists when it has succeeded."""

    title: str
    arguments: tuple[str, ...]
    result: Path

    @property
    def command(self) -> str:
        return "cellfast " + shlex.join(self.arguments)


def demo_steps(
    out: Path,
    *,
    seed: int,
    amp: bool,
    simulation: Sequence[str] = ("--preset", "demo"),
    training: Sequence[str] = ("--recipe", "demo"),
) -> list[Step]:
    """The commands of the demonstration in ``out``: ``amp`` trains in bf16; other options of simulate and train make it smaller."""
    images, screen = out / "simulated", out / "screen"
    steps = [
        Step(
            "Simulate a screen in BBBC021's layout",
            ("simulate", str(images), *simulation, "--seed", str(seed), "--force"),
            images / "image.csv",
        ),
        Step(
            "Cut the cells out of the fields into a crop store",
            (
                *("ingest", "fields", str(images / "image.csv"), "--image-root", str(images / "images")),
                *(
                    "--locations",
                    str(images / "locations"),
                    "--moa",
                    str(images / "moa.csv"),
                    "--crop-size",
                    "56",
                    "-o",
                    str(screen),
                ),
            ),
            screen / "ledger.json",
        ),
    ]
    train = ("train", str(screen), *training, "--seed", str(seed), "--force")
    for name, title, options in (
        ("trained", "Train the encoder by contrastive learning", ("--amp",) if amp else ()),
        ("random", "For comparison: the same encoder, randomly initialised", ("--steps", "0")),
    ):
        run, embeddings, folder = out / name / "run", out / name / "embeddings", out / name
        steps += [
            Step(title, (*train, *options, "-o", str(run)), run / "model.pt"),
            Step(
                "Embed every cell",
                ("embed", str(screen), "--model", str(run), "-o", str(embeddings)),
                embeddings / "embeddings.json",
            ),
            Step(
                "Profile: well means, centred on the DMSO wells, TVN on them, treatment medians",
                ("profile", str(embeddings), "-o", str(folder / "profiles.parquet")),
                folder / "profiles.parquet",
            ),
            Step(
                "Evaluate: which mechanism of action has the nearest neighbour",
                ("evaluate", str(folder / "profiles.parquet"), "-o", str(folder / "result.json")),
                folder / "result.json",
            ),
        ]
    return steps


def run_in_a_process(arguments: Sequence[str]) -> int:
    """The exit status of ``cellfast ARGUMENTS`` in a process of its own; it prints where this one does."""
    return subprocess.run([sys.executable, "-m", "cellfast", *arguments], env=os.environ.copy()).returncode


def run_demo(
    out: Path,
    *,
    seed: int,
    fresh: bool,
    echo: Callable[[str], None],
    execute: Callable[[Sequence[str]], int] = run_in_a_process,
    **smaller: Sequence[str],
) -> None:
    """Run the demonstration in ``out``, skipping steps that were done there by the same command.

    ``execute`` takes a command's arguments and returns its exit status; ``smaller`` goes to `demo_steps`.
    Raises `CellfastError` when a step fails.
    """
    from cellfast.system import bfloat16_is_native

    begin = time.monotonic()
    amp = bfloat16_is_native()
    steps = demo_steps(out, seed=seed, amp=amp, **smaller)
    memory = out / "demo.json"
    done: dict[str, str] = {}
    if memory.exists() and not fresh:
        remembered = json.loads(memory.read_text(encoding="utf-8"))
        done = remembered["done"] if remembered.get("version") == __version__ else {}
    redo = False
    for number, step in enumerate(steps, 1):
        echo(f"\n[{number}/{len(steps)}] {step.title}\n$ {step.command}")
        # Once a step is done anew everything after it stands on new data.
        if not redo and done.get(step.command) == str(step.result) and step.result.exists():
            echo("already done")
            continue
        redo = True
        for later in steps[number - 1 :]:
            done.pop(later.command, None)
            if later.arguments[0] in ("ingest", "embed"):
                _remove_stale(later)
        start = time.monotonic()
        code = execute(step.arguments)
        if code != 0:
            raise CellfastError(
                f"the demonstration stopped at step {number}: `{step.command}` ended with status {code} (its message is above)"
            )
        done[step.command] = str(step.result)
        write_json(memory, {"version": __version__, "done": done})
        echo(f"done in {time.monotonic() - start:.0f} s")
    echo(demo_summary(out, time.monotonic() - begin, amp=amp))


def _remove_stale(step: Step) -> None:
    """Remove what an earlier demonstration left in the output folder of a step that refuses to mix with it."""
    import shutil

    folder = step.result.parent
    if folder.exists():
        shutil.rmtree(folder)


def demo_summary(out: Path, seconds: float, *, amp: bool) -> str:
    """The closing table: NSC and NSCB of the trained and of the random encoder, and where the pictures are."""
    lines = ["", f"Finished in {seconds:.0f} s. Share of treatments whose nearest neighbour has their mechanism of action:", ""]
    lines.append(f"{'encoder':<10} {'NSC':>16} {'NSCB':>16} {'drop':>8}")
    for name in ("trained", "random"):
        result = json.loads((out / name / "result.json").read_text(encoding="utf-8"))
        cells = []
        for key in ("nsc", "nscb"):
            score = result[key]
            share = "n/a" if score["accuracy"] is None else f"{100 * score['accuracy']:.1f} %"
            cells.append(f"{share} ({score['num_correct']:.6g}/{score['num_evaluated']})")
        drop = "n/a" if result["drop"] is None else f"{100 * result['drop']:.1f} %"
        lines.append(f"{name:<10} {cells[0]:>16} {cells[1]:>16} {drop:>8}")
    lines.append("")
    lines.append("NSC: neighbours of the same compound are left out; NSCB: those of the same batch as well.")
    if not amp:
        lines.append("The training ran in float32: this machine has no native bfloat16 arithmetic (cellfast info --system).")
    pictures = sorted((out / "trained").glob("*.png"))
    lines += [f"picture  {path}" for path in pictures]
    lines += [f"numbers  {out / 'trained' / 'result.json'}", f"profiles {out / 'trained' / 'profiles.parquet'}"]
    return "\n".join(lines)

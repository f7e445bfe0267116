"""The comparison: cells for both sides, then each section, every measurement in a process of its own, one side after the other."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cellfast.benchmark.reference.cells import Cells, prepare_cells, simulated_features, simulated_screen, simulated_treatments
from cellfast.benchmark.reference.quality import measure_quality
from cellfast.benchmark.reference.results import describe, merged, ratios, summary, write_table
from cellfast.benchmark.reference.scaling import measure_scaling
from cellfast.benchmark.reference.sides import Side, cellfast_side, checkout_commit, other_side
from cellfast.benchmark.reference.table import LEAST_SEEDS, PARTS, QUICK, SECTIONS, Settings
from cellfast.errors import CellfastError

MOST_CELLS, QUICK_CELLS, PIECE_CELLS = 1_000, 72, 32
# Features on which the scores of the sides must agree: fewer than the 330 control wells, so that sphering is determined.
AGREED_FEATURES = 256
QUICK_SCALING: dict[str, Any] = {"loaded": (), "scored": (), "minibatches": (24, 96), "step_minibatches": (), "cores": ()}


def measure_reference(
    *,
    reference_dir: str | None = None,
    reference_python: str | None = None,
    screen: str | None = None,
    sections: Sequence[str] = SECTIONS,
    parts: Sequence[str] | None = None,
    quick: bool = False,
    num_cells: int | None = None,
    settings: Settings | None = None,
    quality_settings: Settings | None = None,
    quality_steps: int | None = None,
    seeds: int | None = None,
    scaling: dict[str, Any] | None = None,
    folder: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure cellfast and the reference (or the baseline) on the same cells, machine, threads, encoder, minibatch and input size.

    Args:
        reference_dir: a checkout of the reference implementation; None: the plain baseline stands in.
        reference_python: interpreter of an environment the reference runs in; None: this one.
        screen: a screen of three channels; None: a simulated one.
        sections: of `SECTIONS`. parts: of `PARTS`; None: all, in a quick run all but the slowest.
        quick: smaller sizes for whatever of the following is not given; under three minutes on two cores.
        num_cells: cells taken from the screen; None: all of it up to 1,000.
        settings, quality_settings: sizes and repeats; quality trains at its own size and minibatch.
        quality_steps: minibatches of each training that quality compares; seeds: how many trainings of each kind.
        scaling: arguments of `measure_scaling`.
        folder: keep the prepared cells here; None: a temporary folder.

    Returns:
        ``{"subject", "other", "cells", "settings", <section>: …}``.

    Raises:
        CellfastError: no such checkout, an interpreter it does not run in, cells that do not fit, sides that disagree.
    """
    settings = settings or (QUICK if quick else Settings())
    quality_settings = quality_settings or (QUICK if quick else replace(settings, batch_size=128, size=56))
    parts = parts or [name for name in PARTS if not (quick and name == "score with pictures")]
    for kind, given, known in (("section", sections, SECTIONS), ("part", parts, PARTS)):
        if unknown := [name for name in given if name not in known]:
            raise CellfastError(f"unknown {kind} {', '.join(unknown)}: choose from {', '.join(known)}")
    other = other_side(reference_dir, reference_python, keep=settings.one_process)
    if other.name == "reference":
        for size in {settings.size, quality_settings.size}:
            check_reference_size(size)
    ours = [cellfast_side(keep=settings.one_process)] if quick else measured_sides()
    result: dict[str, Any] = {
        "subject": "reference",
        "other": {"name": other.name, "commit": checkout_commit(reference_dir)},
        "settings": asdict(settings),
    }
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cellfast-bench-", dir=folder)))
        for side in (*ours, other):
            stack.callback(side.close)
            if side.keep:
                side.begin(settings.threads)  # imports its libraries while the cells are made
        most = num_cells or (QUICK_CELLS if quick else MOST_CELLS)
        source = Path(screen) if screen else simulated_screen(work, most, settings.size)
        prepared: dict[int, Cells] = {}

        def cells_of(chosen: Settings) -> Cells:
            size = chosen.size
            if size not in prepared:
                cells = prepare_cells(source, work / f"cells-{size}", size=size, num_cells=most, exactly=num_cells is not None)
                prepared[size] = cells if screen else replace(cells, origin="simulated screen")
                say(f"{cells.num_cells} cells of {size} px as strips and as crop store ({prepared[size].origin})")
            if prepared[size].num_cells < chosen.batch_size:
                raise CellfastError(
                    f"{prepared[size].num_cells} cells do not fill a minibatch of {chosen.batch_size}: give a smaller --batch-size or more cells"
                )
            return prepared[size]

        if "agreement" in sections:
            # Small crops: it is about numbers, not about time.
            found = measure_agreement(ours[0], other, cells_of(quality_settings), quality_settings, batch_size=8 if quick else 16)
            result["agreement"] = found
            say(
                f"agreement: first loss to {found['float32']['first_loss_difference']:.1e} in float32, {found['steps']} steps to "
                f"{found['float64']['largest_loss_difference']:.1e} in float64"
            )
        if "parts" in sections:
            cells = cells_of(settings)
            result["cells"] = {"number": cells.num_cells, "size": cells.size, "origin": cells.origin}
            result["parts"] = measure_parts((*ours, other), cells, settings, parts=parts, say=say)
            versions = (entry[other.name].get("versions") for entry in result["parts"].values())
            result["other"]["versions"] = next(filter(None, versions), {})
        if "quality" in sections:
            sides = [side for side in (*ours, other) if side.parts is None]
            steps, count = quality_steps or (2 if quick else 40), seeds or (1 if quick else LEAST_SEEDS)
            result["quality"] = measure_quality(
                sides, cells_of(quality_settings), quality_settings, steps=steps, seeds=range(count), say=say
            )
        if "scaling" in sections:
            chosen = scaling or (QUICK_SCALING if quick else {})
            result["scaling"] = measure_scaling((ours[0], other), cells_of(settings), settings, say=say, **chosen)
    return result


def measured_sides() -> list[Side]:
    """cellfast doing the reference's work, cellfast as it is without options (and both in bf16 where the machine has it), and cellfast with
    the minibatch in pieces."""
    from cellfast.system import bfloat16_is_native

    sides = [
        cellfast_side(recipe, amp=amp)
        for amp in (False, True)[: 1 + bfloat16_is_native()]
        for recipe in ("perakis2021", "default")
    ]
    return [*sides, cellfast_side(parts=("step",), chunk_size=PIECE_CELLS)]


def check_reference_size(size: int) -> None:
    """The reference blurs with a kernel of ``int(size / 10)`` px, which must be odd.

    Raises:
        CellfastError: with the sizes that work.
    """
    if int(0.1 * size) % 2 == 0:
        raise CellfastError(
            f"--size {size}: the reference's blur needs an odd kernel of a tenth of the size; use 50 to 59, 70 to 79 or 90 to 99"
        )


def measure_parts(
    sides: Sequence[Side], cells: Cells, settings: Settings, *, parts: Sequence[str], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure ``parts`` on the sides; the first is cellfast, the last what it is compared with.

    Returns:
        part → ``{"what", <side>: summary, "times_faster", "memory_ratio"}``; see `summary` and `ratios`.

    Raises:
        CellfastError: the sides disagree, or a side failed.
    """
    tables = {
        "features": lambda: simulated_features(settings.score_cells, settings.score_features),
        "treatments": lambda: simulated_treatments(settings.score_features),
    }
    found: dict[str, Any] = {}
    for name in parts:
        part, present = PARTS[name], [side for side in sides if side.parts is None or name in side.parts]
        if part.reference_only and sides[-1].name != "reference":
            continue
        job = {**cells.job(), **settings.job(), "warm_up": part.warm_up, "repeats": 1 if part.slow else settings.repeats}
        job |= {"agreed_features": AGREED_FEATURES, "pictures": name == "score with pictures"}
        if part.table:
            job |= write_table(cells.folder, part.table, *tables[part.table]())
        rounds = max(1, settings.slow_repeats - part.long) if part.slow else 1
        results: dict[str, list[dict[str, Any]]] = {side.label: [] for side in present}
        for _ in range(rounds):
            for side in present:
                results[side.label].append(side.run(name, **job))
        entry: dict[str, Any] = {"what": part.what, **{label: summary(merged(values)) for label, values in results.items()}}
        *ours, other = results
        for label in results:
            say(f"{name:<11} {label:<26} {describe(entry[label])}")
        for key in part.agree:
            values = [entry[label][key] for label in results if key in entry[label]]
            if values and max(values) - min(values) > part.tolerance * max(1.0, abs(values[0])):
                raise CellfastError(
                    f"{name}: the sides disagree on {key} ({', '.join(map(str, values))}): their times cannot be compared"
                )
        for label in ours:
            entry[label] |= ratios(entry[label], entry[other])
        entry |= ratios(entry[ours[0]], entry[other])
        if "times_faster" in entry:
            say(f"{name:<11} {entry['times_faster']:.1f} × as fast")
        found[name] = entry
    return found


def measure_agreement(
    ours: Side, other: Side, cells: Cells, settings: Settings, *, batch_size: int = 16, steps: int = 3
) -> dict[str, Any]:
    """Losses of training steps from the same weights, crops and views, number by number.

    In float32 the first loss is compared, from the crops on. In float64, from the very same inputs, every loss of ``steps`` steps and the
    features after them are: encoder, per-view BatchNorm, head, NT-Xent, Adam and weight decay.
    """
    found: dict[str, Any] = {"cells": batch_size, "steps": steps}
    for name in ("float32", "float64"):
        job = {
            **cells.job(), **settings.job(), "batch_size": batch_size, "steps": steps, "double": name == "float64", "workers": 0,
            "weights": str(cells.folder / f"weights-{name}.pt"), "inputs": str(cells.folder / f"inputs-{name}.npy"),
        }  # fmt: skip
        there = other.run("agree", **job)
        here = ours.run("agree", **job)
        found[name] = {
            "losses": here["losses"],
            f"losses of the {other.name}": there["losses"],
            "first_loss_difference": abs(here["losses"][0] - there["losses"][0]),
            "largest_loss_difference": max(abs(x - y) for x, y in zip(here["losses"], there["losses"])),
            "largest_feature_difference": max(abs(x - y) for x, y in zip(here["features"], there["features"])),
            "largest_input_difference": here["largest_input_difference"],
        }
    return found

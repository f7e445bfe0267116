"""cellfast beside the reference implementation (a user's checkout, driven as it is) or a plain PyTorch baseline: speed, memory, quality, scaling.

The reference's code is neither copied nor shipped: `adapter` drives a checkout in an environment of its own.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cellfast.benchmark.reference.cells import Cells, prepare_cells, simulated_screen
from cellfast.benchmark.reference.parts import PARTS, Settings, label, measure_agreement, measure_parts, write_scored_table
from cellfast.benchmark.reference.quality import measure_quality
from cellfast.benchmark.reference.scaling import measure_scaling
from cellfast.benchmark.reference.sides import Side, cellfast_side, checkout_commit, other_side
from cellfast.errors import CellfastError

SECTIONS = ("parts", "agreement", "quality", "scaling")
MOST_CELLS, QUICK_CELLS = 1_000, 72
PIECE_CELLS = 32
# Not in a quick run, unless asked for by name.
LONG_PARTS = ("score with pictures",)
QUICK = Settings(batch_size=24, size=56, repeats=1, slow_repeats=1, score_cells=1_000, score_features=64, one_process=True)
QUICK_SCALING: dict[str, Any] = {
    "loaded": (), "scored": (), "minibatches": (24, 96), "step_minibatches": (), "cores": (),
}  # fmt: skip


def measure_reference(
    *,
    reference_dir: str | None = None,
    reference_python: str | None = None,
    screen: str | None = None,
    sections: Sequence[str] = SECTIONS,
    parts: Sequence[str] = tuple(PARTS),
    quick: bool = False,
    num_cells: int | None = None,
    settings: Settings | None = None,
    quality_settings: Settings | None = None,
    quality_steps: int | None = None,
    seeds: Sequence[int] = (0,),
    scaling: dict[str, Any] | None = None,
    folder: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure cellfast and the reference (or the baseline) on the same cells, machine, threads, encoder, minibatch and input size.

    Args:
        reference_dir: a checkout of the reference implementation; None: the plain baseline stands in.
        reference_python: interpreter of an environment the reference runs in; None: this one.
        screen: a screen of three channels; None: a simulated one.
        sections: of `SECTIONS`. parts: of the section parts.
        quick: smaller sizes for whatever of the following is not given; under three minutes on two cores.
        num_cells: cells taken from the screen; None: all of it up to 1,000.
        settings, quality_settings: sizes and repeats; quality trains at its own size and minibatch.
        quality_steps: minibatches of each training that quality compares.
        scaling: arguments of `measure_scaling`.
        folder: keep the prepared cells here; None: a temporary folder.

    Returns:
        ``{"subject", "other", "cells", "settings", <section>: …}``.

    Raises:
        CellfastError: no such checkout, an interpreter it does not run in, cells that do not fit, sides that disagree.
    """
    settings = settings or (QUICK if quick else Settings())
    quality_settings = quality_settings or (QUICK if quick else replace(settings, batch_size=128, size=56))
    quality_steps = quality_steps or (2 if quick else 40)
    scaling = scaling or (QUICK_SCALING if quick else {})
    unknown = [s for s in sections if s not in SECTIONS]
    if unknown:
        raise CellfastError(f"unknown section {', '.join(unknown)}: choose from {', '.join(SECTIONS)}")
    other = other_side(reference_dir, reference_python)
    if other.name == "reference":
        for size in {settings.size, quality_settings.size}:
            check_reference_size(size)
    sides = [cellfast_side(), other] if quick else measured_sides(other)
    if quick:
        parts = [part for part in parts if part not in LONG_PARTS] or parts
    result: dict[str, Any] = {
        "subject": "reference",
        "other": {"name": other.name, "commit": checkout_commit(reference_dir)},
        "settings": asdict(settings),
    }
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cellfast-bench-", dir=folder)))
        if settings.one_process:
            for side in sides:
                stack.enter_context(side.one_process(settings.threads))
        most = num_cells or (QUICK_CELLS if quick else MOST_CELLS)
        source = Path(screen) if screen else simulated_screen(work, most, settings.size)
        if num_cells is None and screen:
            from cellfast.screens import Screen

            most = min(most, Screen.open(source).num_cells)
        prepared: dict[int, Cells] = {}

        def cells_of(size: int) -> Cells:
            if size not in prepared:
                target = work / f"cells-{size}"
                target.mkdir()
                prepared[size] = prepare_cells(source, target, size=size, num_cells=most)
                if not screen:
                    prepared[size] = replace(prepared[size], origin="simulated screen")
                say(f"{prepared[size].num_cells} cells of {size} px as strips and as crop store ({prepared[size].origin})")
            return prepared[size]

        if "agreement" in sections:
            # Small crops: it is about numbers, not about time.
            few = cells_of(quality_settings.size)
            result["agreement"] = measure_agreement(sides[0], other, few, quality_settings, batch_size=8 if quick else 16)
            first = result["agreement"]["float32"]["first_loss_difference"]
            rest = result["agreement"]["float64"]["largest_loss_difference"]
            say(f"agreement: first loss to {first:.1e} in float32, {result['agreement']['steps']} steps to {rest:.1e} in float64")
        if "parts" in sections:
            cells = cells_of(settings.size)
            result["cells"] = {"number": cells.num_cells, "size": cells.size, "origin": cells.origin}
            result["parts"] = measure_parts(sides, cells, settings, parts=parts, say=say)
            versions = next((e[other.name]["versions"] for e in result["parts"].values() if "versions" in e[other.name]), {})
            result["other"]["versions"] = versions
        if "quality" in sections:
            result["quality"] = measure_quality(
                [s for s in sides if s.parts is None],
                cells_of(quality_settings.size),
                quality_settings,
                steps=quality_steps,
                seeds=seeds,
                say=say,
            )
        if "scaling" in sections:
            cells = cells_of(settings.size)
            write_scored_table(cells.folder, settings)
            result["scaling"] = measure_scaling((sides[0], other), cells, settings, say=say, **(scaling or {}))
    return result


def measured_sides(other: Side) -> list[Side]:
    """cellfast doing the reference's work, cellfast as it is without options (and both in bf16 where the machine has it), cellfast with the
    minibatch in pieces, the other."""
    from cellfast.system import bfloat16_is_native

    sides = [cellfast_side("perakis2021"), cellfast_side("default")]
    if bfloat16_is_native():
        sides += [cellfast_side("perakis2021", amp=True), cellfast_side("default", amp=True)]
    pieces = cellfast_side("perakis2021", parts=("step",), chunk_size=PIECE_CELLS)
    return [*sides, pieces, other]


def check_reference_size(size: int) -> None:
    """The reference blurs with a kernel of ``int(size / 10)`` px, which must be odd.

    Raises:
        CellfastError: with the sizes that work.
    """
    if int(0.1 * size) % 2 == 0:
        raise CellfastError(
            f"--size {size}: the reference's blur needs an odd kernel of a tenth of the size; use 50 to 59, 70 to 79 or 90 to 99"
        )


__all__ = ["PARTS", "QUICK", "SECTIONS", "Settings", "label", "measure_reference"]

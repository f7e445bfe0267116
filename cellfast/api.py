"""The steps from images to mechanisms of action as Python functions: the commands, with the same names and defaults.

Each writes what its command writes and returns an object that stands for it: given to the next step, or shown at the prompt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellfast.embedding.options import EmbedOptions
from cellfast.errors import CellfastError, option
from cellfast.outcomes import Embeddings, Profiles, Result, SimulatedImages
from cellfast.profiles.build import ProfileOptions
from cellfast.profiles.evaluate import EvaluationOptions
from cellfast.screens.crop_store import Screen
from cellfast.screens.fields import open_fields
from cellfast.screens.ingest_fields import FieldIngestOptions
from cellfast.screens.simulate import MOA_NAMES, PRESETS, SimulationConfig, simulate_screen, with_options
from cellfast.signatures import split, takes
from cellfast.training.config import TrainConfig

if TYPE_CHECKING:
    from cellfast.training.loop import TrainResult

_Path = str | os.PathLike[str]
_Names = str | Sequence[str]


def _names(given: _Names | None) -> tuple[str, ...]:
    """One name, or several."""
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def _channels(given: _Names | None) -> list[str] | None:
    """Names of channels, also as ``"DNA, Actin"``."""
    return [one.strip() for name in _names(given) for one in name.split(",")] or None


def _columns(given: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """``{"compound": "Metadata_JCP2022"}``, or ``["compound=Metadata_JCP2022"]``, as the library takes them."""
    from cellfast.metadata.columns import parse_column_overrides

    if isinstance(given, Mapping):
        given = [f"{name}={column}" for name, column in given.items()]
    return parse_column_overrides(given or ())


def _check_regex(batch_regex: str | None) -> None:
    from cellfast.metadata.batches import batch_of_plate

    batch_of_plate("", batch_regex)


@takes(SimulationConfig, unset=True)
def simulate(
    out: _Path,
    preset: str = "demo",
    *,
    moas: int | _Names | None = None,
    seed: int = 0,
    workers: int | None = None,
    force: bool = False,
    **options: Any,
) -> SimulatedImages:
    """Simulate a screen in BBBC021's layout: TIFF fields, image table, MoA table, nucleus centres and the truth.

    Args:
        out: the folder to write.
        preset: where what is not given comes from: demo, small or bbbc021.
        moas: mechanisms of action: how many, or which.
        seed: the same seed and options give the same bytes.
        workers: processes; None: one per core.
        force: replace an earlier simulated screen in ``out``.
        options: of `SimulationConfig`.

    Raises:
        CellfastError: values outside their limits; ``out`` is in use.
    """
    if preset not in PRESETS:
        raise CellfastError(f"{option('preset')} must be one of {', '.join(sorted(PRESETS))}, got {preset!r}")
    if isinstance(moas, int):
        if not 1 <= moas <= len(MOA_NAMES):
            raise CellfastError(f"{option('moas')} must be between 1 and {len(MOA_NAMES)}, got {moas}")
        moas = MOA_NAMES[:moas]
    config = with_options(PRESETS[preset], moas=_names(moas) or None, seed=seed, **options)
    return SimulatedImages(Path(out), simulate_screen(out, config, workers=workers, force=force, progress=True))


@takes(open_fields, FieldIngestOptions)
def ingest_fields(
    image_csv: _Path | None,
    out: _Path,
    *,
    keep_fields: _Path | None = None,
    workers: int | None = None,
    force: bool = False,
    say: Callable[[str], object] = print,
    **options: Any,
) -> Screen:
    """Cut the cells of the fields listed in an image table into crops.

    Args:
        image_csv: BBBC021's image CSV or CellProfiler's load_data; None with ``pattern``, which reads plates from file names.
        out: the screen folder to write.
        keep_fields: also keep the images in this one file, encoded as they are; it serves as ``image_root`` from then on.
        workers: plates done at the same time; None: one per core.
        force: make plates again that are there already.
        say: is given the ledger: what was found, written, and dropped for which reason.
        options: ``image_root`` and ``locations``, and the others of `cellfast.screens.fields.open_fields` (``columns`` by short
            names, as ``{"compound": "COLUMN"}``) and of `FieldIngestOptions`.

    Raises:
        CellfastError: files that are not what they should be, no cell written, a plate made otherwise before.
    """
    from cellfast.screens.ingest import default_workers
    from cellfast.screens.ingest_fields import ingest_fields as ingest
    from cellfast.screens.keep_fields import check_not_there, keep_fields_told

    if keep_fields is not None:
        check_not_there(Path(keep_fields), force=force)
    how = FieldIngestOptions(**split(FieldIngestOptions, options))
    opened = _open(image_csv, how.batch_regex, options)
    ledger = ingest(screen=Path(out), options=how, workers=workers or default_workers(), force=force, **vars(opened))
    say(ledger.table())
    if keep_fields is not None:
        for line in keep_fields_told(opened.table, str(options["image_root"]), Path(keep_fields)):
            say(line)
    return Screen.open(out)


def _open(image_csv: _Path | None, batch_regex: str | None, options: dict[str, Any]) -> Any:
    for name in ("image_root", "locations"):
        if options.get(name) is None:
            raise CellfastError(f"fields need {option(name)}")
    _check_regex(batch_regex)
    options["channels"] = _channels(options.get("channels"))
    return open_fields(image_csv, **{**options, "columns": _columns(options.get("columns"))})


def ingest_crops(
    index_csv: _Path,
    out: _Path,
    *,
    root: _Path | None = None,
    layout: str = "auto",
    channels: _Names | None = None,
    moa: _Path | None = None,
    metadata: _Path | None = None,
    columns: Mapping[str, str] | Sequence[str] | None = None,
    pixel_size_um: float | None = None,
    batch_regex: str | None = None,
    workers: int | None = None,
    strict: bool = False,
    force: bool = False,
    say: Callable[[str], object] = print,
) -> Screen:
    """Collect ready-made crops, one .npy, TIFF or PNG per cell, listed in an index.

    Args:
        index_csv: file, plate, well, site, cell, compound, concentration, moa, or the reference implementation's index.
        out: the screen folder to write.
        root: folder the file names are relative to; None: the index's.
        layout: axes of a crop's pixels: auto, HWC, CHW or strip.
        channels: names of the channels; None: channel1, channel2, …
        moa, metadata: tables to join by treatment, and by plate and well.
        columns: short name of a column → the one that holds it, where it is not recognised.
        pixel_size_um: kept with the crops.
        batch_regex: its first group in the plate's name is the experimental batch; None: ``^(Week\\d+)_``, else the plate.
        workers: plates done at the same time; None: one per core, for few crops 1.
        strict: stop at the first file that cannot be used.
        force: make plates again that are there already.
        say: is given the ledger: what was found, written, and dropped for which reason.

    Raises:
        CellfastError: files that are not what they should be, no crop written, a plate made otherwise before.
    """
    from cellfast.screens.ingest_crops import ingest_index

    _check_regex(batch_regex)
    ledger = ingest_index(
        os.fspath(index_csv),
        Path(out),
        root=None if root is None else Path(root),
        layout=layout,
        metadata=None if metadata is None else Path(metadata),
        moa=None if moa is None else Path(moa),
        columns=_columns(columns),
        channel_names=_channels(channels),
        pixel_size_um=pixel_size_um,
        batch_regex=batch_regex,
        workers=workers,
        strict=strict,
        force=force,
    )
    say(ledger.table())
    return Screen.open(out)


@takes(TrainConfig, unset=True, refuse=False)
def train(
    screen: _Path,
    out: _Path,
    *,
    config: _Path | None = None,
    recipe: str | None = None,
    resume: bool = False,
    force: bool = False,
    allow_unfinished: bool = False,
    say: Callable[[str], None] = print,
    **options: Any,
) -> TrainResult:
    """Train an encoder on a screen's cells by contrastive learning (SimCLR) and write a run folder.

    Args:
        screen: a screen, or its folder.
        out: the run folder to write.
        config: YAML file of values; those given here win.
        recipe: set of defaults to start from: default, perakis2021 or demo.
        resume: go on from the run's last checkpoint, with the run's own values; from the beginning where there is none yet.
        force: discard a run that is in the folder.
        allow_unfinished: train on the plates that are there of a screen whose ingest has not ended.
        say: prints a line.
        options: of `TrainConfig`; single values of the augmentation as ``**{"augment.blur_p": 0.5}``.

    Raises:
        CellfastError: values that are not known or outside their limits, and as `cellfast.training.loop.train`.
    """
    from cellfast.training.config import resolve_config

    where, run = Path(screen), Path(out)
    if where.is_file():
        raise CellfastError(
            f"{where} is a file; training takes a screen folder of crops. From kept fields: `cellfast ingest fields IMAGE_CSV "
            f"--image-root {where} --locations … -o SCREEN` (docs/device.md tells why minibatches are not fed from fields)"
        )
    if resume and config is None and (run / "config.yaml").exists():
        config = run / "config.yaml"
    values = resolve_config(recipe, config, options)
    from cellfast.training.loop import train as run_training

    return run_training(where, run, values, resume=resume, force=force, allow_unfinished=allow_unfinished, say=say)


@takes(EmbedOptions, open_fields, FieldIngestOptions, without=("pixel_size_um",))
def embed(
    source: _Path | None,
    out: _Path,
    *,
    model: _Path,
    device: str = "auto",
    crop_size: int | None = None,
    image_root: _Path | None = None,
    locations: _Path | None = None,
    threads: int | None = None,
    allow_unfinished: bool = False,
    say: Callable[[str], object] = print,
    **options: Any,
) -> Embeddings:
    """Embed every cell of a screen, or of the fields listed in an image table: one file per plate, a row per cell.

    Fields take the parameters of `ingest_fields` and need no crop store. A run that was stopped goes on where it stopped.

    Args:
        source: a screen or its folder; or an image table, or None with ``pattern``.
        out: folder (or s3://, gs:// URL) to write.
        model: a run, its folder, or its model.pt.
        device: auto, cpu or cuda.
        crop_size: of fields; None: the model's, which it must be.
        threads: CPU threads of the encoder; None: torch's choice.
        allow_unfinished: embed the plates that are there of a screen whose ingest has not ended.
        say: is told what is missing of such a screen, and where ``amp`` is slower than without.
        options: of `EmbedOptions`, and for fields of `cellfast.screens.fields.open_fields`, ``border`` and ``batch_regex``.

    Raises:
        CellfastError: parameters that do not go together, a model that does not fit, files that are not what they should be.
    """
    import torch

    from cellfast.embedding.embed import embed_fields, embed_screen
    from cellfast.model_file import load_model
    from cellfast.training.devices import amp_warning, choose_device

    how = split(EmbedOptions, options)
    where = choose_device(device)
    if threads:
        torch.set_num_threads(threads)
    if how.get("amp") and (warning := amp_warning(where)):
        say(warning)
    loaded = load_model(model, where)
    if source is not None and Path(source).is_dir():
        given = {"image_root": image_root, "locations": locations, "crop_size": crop_size, **options}
        given["decode"] = None if how.get("decode") == "auto" else how.get("decode")
        if wrong := [option(name) for name, value in given.items() if value not in (None, False, ())]:
            raise CellfastError(f"{', '.join(wrong)}: only for fields; {os.fspath(source)} is a folder of crop stores")
        opened = source if isinstance(source, Screen) else Screen.open(source, allow_unfinished=allow_unfinished)
        if opened.unfinished:
            say(f"{opened.path}: {opened.unfinished}")
        return Embeddings(os.fspath(out), embed_screen(opened, loaded, os.fspath(out), device=where, **how))
    if allow_unfinished:
        raise CellfastError(f"{option('allow_unfinished')}: only for a screen folder of crop stores")
    if crop_size not in (None, loaded.crop_size):
        raise CellfastError(
            f"{option('crop_size', crop_size)}: the model {loaded.path} was trained on crops of {loaded.crop_size} px; leave it "
            "out"
        )
    cut = split(FieldIngestOptions, options)
    fields = _open(source, cut.get("batch_regex"), {"image_root": image_root, "locations": locations, **options})
    return Embeddings(os.fspath(out), embed_fields(fields, loaded, os.fspath(out), device=where, **cut, **how))


@takes(ProfileOptions, without=("steps",))
def profile(
    inputs: _Path | Sequence[_Path],
    out: _Path,
    *,
    normalize: _Names = (),
    recipe: str | None = None,
    by: str | None = None,
    lam: str | float | None = None,
    epsilon: float | None = None,
    rotation: str | None = None,
    wells_output: _Path | None = None,
    **options: Any,
) -> Profiles:
    """Aggregate cells to wells and treatments, normalised on control wells.

    Args:
        inputs: embeddings or their folder, or files of cells or wells: one or several.
        out: profiles to write: .parquet, .csv or .csv.gz; the report goes beside them.
        normalize: steps, done in this order, each with options of its own: ``["standardize:by=all,controls=all", "tvn"]``;
            nothing given: those of ``recipe``.
        recipe: steps under a name: default or perakis2021.
        by, lam, epsilon, rotation: of steps that do not say otherwise.
        wells_output: write the normalised wells too.
        options: of `ProfileOptions`; ``columns`` by short names, as ``{"compound": "COLUMN"}``.

    Raises:
        CellfastError: whatever the user can mend: files, columns, joins, controls, conflicting metadata.
    """
    from cellfast.atomic import write_json
    from cellfast.profiles.build import build_profiles
    from cellfast.profiles.steps import RECIPES, parse_steps
    from cellfast.profiles.table import check_output, write_profiles

    out = Path(out)
    outputs = [out, *([Path(wells_output)] if wells_output is not None else [])]
    for file in outputs:
        check_output(file)
    if wells_output is not None and options.get("level", "treatment") != "treatment":
        raise CellfastError(f"{option('wells_output')} goes with {option('level', 'treatment')}")
    if epsilon is not None and lam is not None:
        raise CellfastError(f"{option('epsilon')} and {option('lam')} are two ways to regularise: give one")
    if normalize and recipe:
        raise CellfastError(f"{option('normalize')} and {option('recipe')} both say the steps: give one")
    if recipe is not None and recipe not in RECIPES:
        raise CellfastError(f"{option('recipe')} must be one of {', '.join(RECIPES)}, got {recipe!r}")
    # A recipe z-scores over all wells; these, given alone, are meant for the steps on controls.
    defaults = {"controls": options.get("controls"), "by": by, "rotation": rotation, "epsilon": epsilon}
    defaults["lam"] = None if lam is None else str(lam)
    steps = parse_steps(_names(normalize) or RECIPES[recipe or "default"], defaults)
    for name in ("features", "group_by", "pool", "select"):
        if name in options:
            options[name] = _names(options[name])
    files = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    how = ProfileOptions(**{**options, "steps": steps, "columns": _columns(options.get("columns"))})
    built = build_profiles([os.fspath(one) for one in files], how, outputs=outputs)
    write_profiles(built.profiles, out)
    if wells_output is not None and built.wells is not None:
        write_profiles(built.wells, wells_output)
    write_json(out.with_name(out.name.split(".")[0] + ".report.json"), built.report)
    return Profiles(out, built)


@takes(EvaluationOptions)
def evaluate(
    profiles: _Path,
    out: _Path,
    *,
    metadata: _Path | None = None,
    moa: _Path | None = None,
    features: _Names = (),
    columns: Mapping[str, str] | Sequence[str] | None = None,
    wells: _Path | None = None,
    map: str = "tsne",
    pictures: bool = True,
    **options: Any,
) -> Result:
    """Score profiles by mechanism of action: NSC, NSCB and drop, with their counts, intervals and pictures.

    Args:
        profiles: profiles, or their file.
        out: result to write, .json; pictures and the table of profiles go beside it.
        metadata, moa: tables to join.
        features: prefixes or regular expressions of feature names; nothing given: inferred.
        columns: short name of a column → the one that holds it, where it is not recognised.
        wells: the wells of these treatments, for replicate reproducibility and precision.
        map: map of the profiles in the pictures: tsne, umap, pca or none.
        options: of `EvaluationOptions`.

    Raises:
        CellfastError: as `cellfast.profiles.evaluate.evaluate_profiles`; files that are not what they should be.
    """
    from cellfast.profiles.evaluate import evaluate_profiles
    from cellfast.profiles.results import read_annotated, write_result

    if Path(out).suffix.lower() != ".json":
        raise CellfastError(f"the result must be a .json file, got '{Path(out).name}'")
    if map not in ("tsne", "umap", "pca", "none"):
        raise CellfastError(f"{option('map')} must be one of tsne, umap, pca, none; got {map!r}")
    join: dict[str, Any] = {"metadata": metadata, "moa": moa, "features": _names(features), "columns": _columns(columns)}
    for name in ("group_by", "pool"):
        if name in options:
            options[name] = _names(options[name])
    how = EvaluationOptions(**options)
    evaluation = evaluate_profiles(read_annotated(profiles, **join), how, read_annotated(wells, **join) if wells else None)
    return Result(Path(out), evaluation, write_result(evaluation, out, map if pictures else None))

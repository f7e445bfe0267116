"""``cellfast export``: a model as one file that other programs run."""

from __future__ import annotations

from pathlib import Path

import click


class BatchSize(click.ParamType):
    """A whole number, or ``dynamic`` (None)."""

    name = "N|dynamic"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value in (None, "dynamic"):
            return None
        try:
            number = int(str(value))
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"{value!r} is neither a whole number of at least 1 nor 'dynamic'", param, ctx)
        return number


@click.command()
@click.argument("model_path", metavar="RUN_OR_MODEL", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The file to write.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["torchscript", "pt2", "onnx"]),
    help="TorchScript (*.ts, *.torchscript, *.pt), torch.export (*.pt2) or ONNX.  [default: by the file's suffix]",
)
@click.option(
    "--features", type=click.Choice(["h", "z"]), default="h", show_default=True, help="Encoder output h, or projection z."
)
@click.option("--batch-size", type=BatchSize(), default="dynamic", show_default=True, help="Crops per call, or any number.")
@click.option(
    "--check", "screen", type=click.Path(path_type=Path), help="Compare on this screen's crops.  [default: random crops]"
)
@click.option("--check-cells", type=click.IntRange(min=1), default=64, show_default=True, help="How many crops to compare on.")
@click.option("--force", is_flag=True, help="Replace the file.")
def export(
    model_path: Path,
    out: Path,
    format_name: str | None,
    features: str,
    batch_size: int | None,
    screen: Path | None,
    check_cells: int,
    force: bool,
) -> None:
    """Write the model of RUN_OR_MODEL as a program for libtorch, torch.export or ONNX Runtime.

    It takes crops as they are stored, uint8 or uint16 [B, C, S, S] (and, for a model with scaling per plate, the plate's low and
    high, float32 [C]); intensity scaling and centre crop are inside. It gives features, float32 [B, F]. The file is compared
    with the Python model before it is written; a relative difference above 1e-4 is an error.
    """
    from cellfast.export import check_target, export_model
    from cellfast.model_file import load_model
    from cellfast.screens import Screen

    model = load_model(model_path)
    check_target(out, format_name, model.path, force=force)
    summary = export_model(
        model,
        out,
        format=format_name,
        features=features,
        batch_size=batch_size,
        check=Screen.open(screen) if screen else None,
        check_cells=check_cells,
        force=force,
    )
    click.echo(
        f"{summary.path}: {summary.format}, {summary.num_features} features {features} per crop, {summary.num_bytes / 1e6:.1f} MB"
    )
    click.echo(
        f"compared with the Python model on {summary.cells_checked} {summary.checked_on}: largest difference "
        f"{summary.largest_absolute:.2g} absolute, {summary.largest_relative:.2g} relative"
    )

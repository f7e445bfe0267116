"""NT-Xent beside its peers: ``python benchmarks/bench_ntxent.py [--device cuda] [--dtype bfloat16] [--out FILE.json] [--plot FILE.png]``."""

from __future__ import annotations

import click

from cellfast.atomic import write_json
from cellfast.benchmark import environment
from cellfast.benchmark.ntxent import DTYPES, measure_ntxent, plot, table

CPU_SIZES = ((64, 128), (512, 128), (2048, 128), (8192, 128), (8192, 512), (65536, 128))
CUDA_SIZES = ((512, 128), (8192, 128), (65536, 128), (65536, 512), (262144, 256), (1048576, 128))


def _sizes(text: str | None, device: str) -> tuple[tuple[int, int], ...]:
    if text is None:
        return CPU_SIZES if device == "cpu" else CUDA_SIZES
    try:
        return tuple((int(m), int(d)) for m, d in (size.lower().split("x") for size in text.split(",")))
    except ValueError:
        raise click.UsageError(f"--sizes takes MxD,MxD,…, for example 512x128,8192x128; got {text!r}") from None


@click.command()
@click.option("--sizes", help="MxD,MxD,… (default: the published ones for the device).")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--temperature", default=0.1, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--out", type=click.Path(), help="Write the result as JSON.")
@click.option("--plot", "picture", type=click.Path(), help="Draw time and memory against M.")
def main(
    sizes: str | None, device: str, dtype: str, temperature: float, repeats: int, out: str | None, picture: str | None
) -> None:
    """Time and memory of forward and backward; agreement is checked first."""
    result = measure_ntxent(_sizes(sizes, device), repeats=repeats, temperature=temperature, device=device, dtype=dtype)
    click.echo(table(result))
    if out:
        write_json(out, {"subject": "ntxent", "quick": False, "environment": environment(), "result": result})
    if picture:
        plot(result, picture)


if __name__ == "__main__":
    main()

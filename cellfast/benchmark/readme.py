"""README's table of measured figures, made from benchmarks/results/*.json: ``python -m cellfast.benchmark.readme [--check]``.

A subject's rows come from its function in `FIGURES`; a result of another subject may carry its own rows as
``result["figures"] = [{"what", "cellfast", "beside"}]``.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellfast.benchmark import SUBJECTS
from cellfast.errors import CellfastError

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- figures: made by `make figures` from benchmarks/results/*.json -->"
END = "<!-- end of figures -->"


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, cellfast's figure, and the figure of what stands beside it."""

    what: str
    cellfast: str
    beside: str


def number(value: float) -> str:
    """Three significant digits, whole numbers above 100 with thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _loader(r: dict[str, Any]) -> Iterator[Row]:
    rates = {name: rate["median"] for name, rate in r["rates"].items()}
    memcpy = next(v for k, v in rates.items() if k.startswith("memcpy"))
    dali = f"; through DALI {number(rates['Loader dali'])}" if "Loader dali" in rates else ""
    yield Row(
        f"shuffled minibatches of {r['batch_size']}, {number(r['bytes_per_cell'] / 1000)} kB per cell, cells/s, one thread",
        f"{number(rates['gather, 1 thread'])} gathered, {number(rates['Loader mmap'])} through the loader",
        f"memcpy of the same bytes {number(memcpy)}{dali}",
    )


def _augment(r: dict[str, Any]) -> Iterator[Row]:
    rates = {name: rate["median"] for name, rate in r["rates"].items()}
    chains = [f"{number(rates[f'Kornia modules, as {n}'])}" for n in ("default", "perakis2021")]
    yield Row(
        f"two views per cell, {r['crop_size']} → {r['output_size']} px × {r['num_channels']}, cells/s, {r['threads']} threads",
        f"default {number(rates['default'])}, perakis2021 {number(rates['perakis2021'])}",
        f"explicit Kornia chains {' and '.join(chains)}",
    )


def _train(r: dict[str, Any]) -> Iterator[Row]:
    rates = r["cells_per_second"]
    yield Row(
        f"training step, {r['encoder']}, {r['output_size']} px, minibatch {r['batch_size']}, "
        f"{'bfloat16' if r['amp'] else 'float32'}, cells/s, {r['threads']} threads",
        number(rates["full"]),
        f"the bare encoder's forward and backward {number(rates['bare'])}: fraction {r['fraction']:.2f}"
        + (
            f"; with torch's convolutions alone {number(rates[general])}"
            if (general := "bare_without_small_maps") in rates
            else ""
        ),
    )


def _ntxent(r: dict[str, Any]) -> Iterator[Row]:
    for row in r["rows"]:
        # Peers are in "peers"; results of version 0.1.0's first days have them beside the sizes.
        peers = row.get("peers") or {name: {"forward_backward": row[name]} for name in ("cellfast", "plain PyTorch")}
        times = {name: peer["forward_backward"]["median_ms"] for name, peer in peers.items() if "forward_backward" in peer}
        ours = times.pop("cellfast", None)
        if ours is None:
            continue
        beside = ", ".join(f"{name} {number(ms)} ms" for name, ms in sorted(times.items(), key=lambda item: item[1])[:4])
        yield Row(
            f"NT-Xent, M = {row['M']}, D = {row['D']}, forward + backward, {r['threads']} threads",
            f"{number(ours)} ms",
            beside or "others need too much memory or time",
        )


def _ingest(r: dict[str, Any]) -> Iterator[Row]:
    for name, rate in r["rates"].items():
        fraction = r["fraction_of_reading"].get(name)
        if fraction is not None:
            yield Row(
                f"ingest, {name}, {r['crop_size']} px crops, cells/s",
                number(rate["median"]),
                f"{100 * fraction:.0f} % of the rate of merely reading the images",
            )


def _evaluate(r: dict[str, Any]) -> Iterator[Row]:
    if "aggregate" in r:
        times = r["aggregate"]["shuffled"]
        yield Row(
            f"means per well of {r['aggregate']['cells']:,} cells × {r['aggregate']['features']}, shuffled, {r['threads']} threads",
            f"{number(1e3 * times['mean']['median'])} ms",
            f"torch index_add_ {number(1e3 * times['torch_index_add']['median'])} ms",
        )
    if "neighbours" in r:
        n = r["neighbours"]
        yield Row(
            f"NSC and NSCB neighbours of {n['treatments']:,} profiles × {n['features']}",
            f"{number(n['nsc_and_nscb']['median'])} s",
            f"scikit-learn {number(n['scikit_learn']['median'])} s, one NumPy product (NSC only) "
            f"{number(n['numpy_product_masked_argmax_nsc_only']['median'])} s",
        )


def _reference(r: dict[str, Any]) -> Iterator[Row]:
    from cellfast.benchmark.reference.report import side_names

    other, s = r["other"]["name"], r["settings"]
    named = {"reference": "reference implementation", "baseline": "plain PyTorch baseline"}[other]
    for part, entry in r.get("parts", {}).items():
        names = side_names(entry)
        ours, theirs = entry[names[0]], entry[names[-1]]
        if "times_faster" not in entry:
            continue
        where = f"{s['size']} px, minibatch {s['batch_size']}, {s['encoder']}, {s['threads']} threads"
        if part.startswith(("score", "evaluate")):
            where = f"{s['score_features']} features, {s['threads']} threads"
        yield Row(
            f"{part}: {entry['what']} ({where}), {'treatments' if part == 'evaluate' else 'cells'}/s",
            f"{number(ours['cells_per_second'])}, peak {ours['peak_bytes'] / 2**30:.2f} GiB",
            f"{named} {number(theirs['cells_per_second'])}, {theirs['peak_bytes'] / 2**30:.2f} GiB: {entry['times_faster']:.3g} ×",
        )
    if "quality" in r:
        q = r["quality"]
        runs = {(run["limit"], run["side"], run["seed"]): run for run in q["runs"]}
        for limit, seed in itertools.product(("same steps", "same time"), q["seeds"]):
            here, there = runs.get((limit, "cellfast", seed)), runs.get(("same steps", other, seed))
            default = runs.get((limit, "cellfast, default recipe", seed))
            if here and there:
                yield Row(
                    f"quality at the {limit}: NSC and NSCB, {q['cells']} cells of {q['size']} px, {q['encoder']}, seed {seed}",
                    f"perakis2021 {_scores(here)}" + (f"; default recipe {_scores(default)}" if default else ""),
                    f"{named} {_scores(there)}",
                )


def _scores(run: dict[str, Any]) -> str:
    shares = " and ".join(
        f"{100 * run[k]['accuracy']:.1f} % ({run[k]['num_correct']:.6g}/{run[k]['num_evaluated']})" for k in ("nsc", "nscb")
    )
    return f"{shares} after {run['steps']} steps in {run['seconds']:.0f} s"


def _memory(r: dict[str, Any]) -> Iterator[Row]:
    yield Row(
        f"memory while training from a store of {r['store_bytes'] / 2**30:.0f} GiB on a machine of {r['machine_bytes'] / 2**30:.0f} GiB, "
        f"minibatch {r['batch_size']}",
        f"{r['peak_own_bytes'] / 2**30:.2f} GiB of its own",
        f"pages of the store that the system may drop {r['peak_file_pages_bytes'] / 2**30:.2f} GiB",
    )


def _embed(r: dict[str, Any]) -> Iterator[Row]:
    rates = r["cells_per_second"]
    yield Row(
        f"embedding, {r['encoder']}, {r['output_size']} px, minibatch {r['batch_size']}, cells/s, {r['threads']} threads",
        f"from TIFF fields {number(rates['fields'])}, from the crop store {number(rates['crop store'])}",
        f"the bare encoder {number(rates['bare encoder'])}",
    )
    if "processes" in r:
        one, two = r["processes"]["1"], r["processes"]["2"]
        yield Row(
            "embedding from fields by 2 processes of one thread, cells/s",
            f"{number(two['cells_per_second'])}, peak {two['peak_memory_mib'] / 1024:.2f} GiB each",
            f"1 process {number(one['cells_per_second'])}: {r['processes']['speedup']:.2f} ×",
        )


def _decode(r: dict[str, Any]) -> Iterator[Row]:
    threads = max(row["threads"] for row in r["rows"])
    for compression in dict.fromkeys(row["compression"] for row in r["rows"]):
        rows = {row["decode"]: row for row in r["rows"] if (row["compression"], row["threads"]) == (compression, threads)}
        host = rows.pop("host", None)
        texts = [
            f"DALI ({way}) {number(row['decode_fields_per_second'])}, per core {number(row['per_core'])}"
            for way, row in rows.items()
        ]
        yield Row(
            f"decoding fields of {r['channels']} × {r['height']} × {r['width']}, 16-bit TIFF, compression {compression}, fields/s, {threads} threads",
            "; ".join(texts),
            f"tifffile {number(host['decode_fields_per_second'])}, per core {number(host['per_core'])}" if host else "",
        )


FIGURES: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "reference": _reference, "ntxent": _ntxent, "ingest": _ingest, "loader": _loader, "augment": _augment, "train": _train, "embed": _embed,
    "evaluate": _evaluate, "decode": _decode, "memory": _memory,
}  # fmt: skip


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """The documents of ``*.json`` in ``folder``, in the order of `FIGURES`, others after them by name.

    Raises:
        CellfastError: a file that is not a benchmark's result, or one of a --quick run.
    """
    documents = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            subject, quick = document["subject"], document["quick"]
            document["environment"]["system"], document["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise CellfastError(
                f"{path}: expected a result of cellfast benchmark (subject, quick, environment, result): {error!r}"
            ) from error
        if quick:
            raise CellfastError(f"{path}: made with --quick, whose figures say little: measure it without")
        documents.append((list(FIGURES).index(subject) if subject in FIGURES else len(FIGURES), subject, document))
    return [document for _, _, document in sorted(documents, key=lambda item: item[:2])]


def figures(folder: str | Path) -> str:
    """The table and the machines it was measured on, as Markdown."""
    machines: list[str] = []
    lines = ["| what | cellfast | beside it | command |", "|---|---|---|---|"]
    for document in read_results(folder):
        subject, result = document["subject"], document["result"]
        if subject in FIGURES:
            rows = list(FIGURES[subject](result))
        else:
            rows = [Row(f["what"], f["cellfast"], f["beside"]) for f in result.get("figures", [])]
        if not rows:
            continue
        machine = _machine(document["environment"])
        if machine not in machines:
            machines.append(machine)
        mark = machines.index(machine)
        for row in rows:
            note = "" if mark == 0 else f" ({'abcdefgh'[mark - 1]})"
            command = f"cellfast benchmark {subject}" if subject in SUBJECTS else f"python benchmarks/bench_{subject}.py"
            lines.append(f"| {row.what}{note} | {row.cellfast} | {row.beside} | `{command}` |")
    if len(lines) == 2:
        raise CellfastError(f"{folder}: no results; make them with `make bench`")
    lines.append("")
    for number_, machine in enumerate(machines):
        lines.append(f"{'Measured' if number_ == 0 else f'({chr(96 + number_)}) measured'} on {machine}.")
    return "\n".join(lines)


def _machine(environment: dict[str, Any]) -> str:
    s = environment["system"]
    gpus = ", ".join(gpu["name"] for gpu in s["gpus"]) or "no GPU"
    bf16 = "" if s["bfloat16_native"] else ", no bfloat16 instructions"
    return (
        f"{s['cpu']['name']}, {s['cpu']['cores']} cores{bf16}, {s['memory_bytes'] / 2**30:.0f} GiB, {gpus}; Python {s['python']}, "
        f"torch {s['packages']['torch']}, cellfast {s['cellfast']}"
    )


def with_figures(text: str, folder: str | Path) -> str:
    """``text`` with everything between the two marks replaced by `figures`.

    Raises:
        CellfastError: the marks are not there exactly once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise CellfastError(f"expected the lines {BEGIN!r} and {END!r} once each, in this order")
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n" + figures(folder) + "\n" + text[text.index(END) :]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write README.md's figures, or with ``--check`` only say whether they agree (status 1 where they do not)."""
    from cellfast.atomic import write_text

    check = "--check" in (sys.argv[1:] if arguments is None else arguments)
    readme = root / "README.md"
    if not readme.is_file():
        print(f"{readme}: not there; the figures are made in a source checkout", file=sys.stderr)
        return 2
    before = readme.read_text(encoding="utf-8")
    try:
        after = with_figures(before, root / "benchmarks" / "results")
    except CellfastError as error:
        print(f"{readme.name}: {error}", file=sys.stderr)
        return 2
    if check:
        if before != after:
            print("README.md does not agree with benchmarks/results: run `make figures`", file=sys.stderr)
        return int(before != after)
    if before != after:
        write_text(readme, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())

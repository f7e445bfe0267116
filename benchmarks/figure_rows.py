"""What each subject's JSON says: one function for each, from its result to rows of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cellfast.benchmark.reference.report import side_names

# Part, which of cellfast's sides (None: the first), quantity, aim, what it is.
AIMS = (
    ("step", None, "times_faster", 2.0, "training step, float32"),
    ("epoch", None, "times_faster", 2.0, "training, a whole epoch, float32"),
    ("epoch", "cellfast, bf16", "times_faster", 3.5, "training, a whole epoch, --amp"),
    ("loss", None, "times_faster", 200.0, "NT-Xent"),
    ("load and augment", None, "times_faster", 20.0, "loading and augmentation"),
    ("evaluate", None, "times_faster", 100.0, "NSC and NSCB of treatments"),
    ("score", None, "times_faster", 100.0, "NSC and NSCB from cells, without pictures"),
    ("step", None, "memory_ratio", 1 / 3, "peak memory of a training step"),
    ("step", "in pieces", "memory_ratio", 1 / 3, "peak memory of a training step, --chunk-size"),
)


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured, cellfast's figure, and the figure of what it is compared with."""

    what: str
    cellfast: str
    other: str


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
        f"chains of Kornia's modules {' and '.join(chains)}",
    )


def _train(r: dict[str, Any]) -> Iterator[Row]:
    rates = r["cells_per_second"]
    yield Row(
        f"training step, {r['encoder']}, {r['output_size']} px, minibatch {r['batch_size']}, "
        f"{'bfloat16' if r['amp'] else 'float32'}, cells/s, {r['threads']} threads",
        number(rates["full"]),
        f"the bare encoder's forward and backward {number(rates['bare'])}: {r['fraction']:.2f} ×"
        + (
            f"; with torch's convolutions alone {number(rates[general])}"
            if (general := "bare_without_small_maps") in rates
            else ""
        ),
    )


def _ntxent(r: dict[str, Any]) -> Iterator[Row]:
    for row in r["rows"]:
        times = {name: peer["forward_backward"]["median_ms"] for name, peer in row["peers"].items() if "forward_backward" in peer}
        ours = times.pop("cellfast", None)
        if ours is None:
            continue
        share = (
            f", {100 * row['peers']['cellfast']['of_mm']:.0f} % of torch.mm's rate" if "of_mm" in row["peers"]["cellfast"] else ""
        )
        others = ", ".join(f"{name} {number(ms)} ms" for name, ms in sorted(times.items(), key=lambda item: item[1])[:4])
        yield Row(
            f"NT-Xent, M = {row['M']}, D = {row['D']}, forward and backward, {r['threads']} threads",
            f"{number(ours)} ms{share}",
            others or "others need too much memory or time",
        )


def _ingest(r: dict[str, Any]) -> Iterator[Row]:
    for name, rate in r["rates"].items():
        fraction = r["fraction_of_reading"].get(name)
        if fraction is not None:
            yield Row(
                f"{name}, {r['crop_size']} px crops, cells/s",
                number(rate["median"]),
                f"{100 * fraction:.0f} % of the rate of reading the images and doing nothing else",
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


def other_name(r: dict[str, Any]) -> str:
    """What a comparison compares cellfast with."""
    return {"reference": "reference implementation", "baseline": "plain PyTorch baseline"}[r["other"]["name"]]


def _reference(r: dict[str, Any]) -> Iterator[Row]:
    s = r["settings"]
    for part, entry in r.get("parts", {}).items():
        if "times_faster" not in entry:
            continue
        names = side_names(entry)
        ours, theirs = entry[names[0]], entry[names[-1]]
        where = f"{s['size']} px, minibatch {s['batch_size']}, {s['encoder']}, {s['threads']} threads"
        if part.startswith(("score", "evaluate")):
            where = f"{s['score_features']} features, {s['threads']} threads"
        yield Row(
            f"{part}: {entry['what']} ({where}), {'treatments' if part == 'evaluate' else 'cells'}/s",
            f"{number(ours['cells_per_second'])}, peak {ours['peak_bytes'] / 2**30:.2f} GiB",
            f"{other_name(r)} {number(theirs['cells_per_second'])}, {theirs['peak_bytes'] / 2**30:.2f} GiB: {entry['times_faster']:.3g} ×",
        )


def load_and_augment(parts: dict[str, Any]) -> tuple[float, float]:
    """Cells/s of loading once and making two views, one after the other: cellfast's, and the other side's."""
    rates = [[entry[names[side]]["cells_per_second"] for side in (0, -1)] for entry, names in
             ((parts[part], side_names(parts[part])) for part in ("load", "augment"))]  # fmt: skip
    ours, other = (1 / (1 / load + 1 / augment) for load, augment in zip(*rates))
    return ours, other


def aims(r: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """The aims of the comparison with the reference, each with what was measured and whether it is met."""
    parts = dict(r.get("parts", {}))
    if {"load", "augment"} <= set(parts):
        ours, other = load_and_augment(parts)
        parts["load and augment"] = {"times_faster": ours / other}
    for part, side, key, aim, what in AIMS:
        entry = parts.get(part, {})
        if side is not None:
            entry = next((entry[name] for name in side_names(entry) if side in name), {})
        if key in entry:
            met = entry[key] >= aim if key == "times_faster" else entry[key] <= aim
            sign = f"at least {aim:.3g} × as fast" if key == "times_faster" else f"at most {aim:.3g} of its memory"
            yield what, sign, f"{entry[key]:.3g}", "met" if met else "missed"


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
    threads = min(row["threads"] for row in r["rows"])
    for compression in dict.fromkeys(row["compression"] for row in r["rows"]):
        rows = {row["decode"]: row for row in r["rows"] if (row["compression"], row["threads"]) == (compression, threads)}
        host = rows.pop("host", None)
        texts = [f"DALI ({way}) {number(row['per_core'])}" for way, row in rows.items() if "failed" not in row]
        yield Row(
            f"reading fields of {r['channels']} × {r['height']} × {r['width']} out of FIELDS.h5, 16-bit TIFF, compression {compression}, "
            "fields per second of one core's time",
            "; ".join(texts) or "left to tifffile",
            f"tifffile {number(host['per_core'])}" if host else "",
        )


def _normalisation(r: dict[str, Any]) -> Iterator[Row]:
    def scores(one: dict[str, Any]) -> str:
        if "error" in one:
            return "cannot be done"
        keys = ("nsc", "nscb", "map_moa", "map_replicates", "batch_probe")
        return ", ".join("–" if one[key] is None else f"{100 * one[key]:.1f}" for key in keys)

    others = {"without centring": "z all, tvn", "centred per plate": "z all, centre plate, tvn", "perakis2021": "perakis2021: tvn, lambda 1",
              "ranks first": "rank, centre shrunk, tvn"}  # fmt: skip
    for screen, orders in r.items():
        chance = orders["z all, tvn"]["batch_chance"]
        yield Row(
            f"{screen}: NSC, NSCB, mAP of MoAs, of replicates, batch of held-out controls"
            + ("" if chance is None else f" (chance {100 * chance:.0f})") + ", %",
            scores(orders["z all, centre shrunk, tvn"]),
            "; ".join(f"{name} {scores(orders[order])}" for name, order in others.items()),
        )  # fmt: skip


def _coverage(r: dict[str, Any]) -> Iterator[Row]:
    for screen, found in r["coverage"].items():
        scores = {"": found} if "coverage" in found else {f", {name}": one for name, one in found.items()}
        for name, one in scores.items():
            yield Row(f"95 % intervals, {screen}{name}: hold the truth in", f"{100 * one['coverage']:.0f} %", "95 %")
    for test, share in r["size"].items():
        yield Row(f"p ≤ 0.05 without an effect, {test}", f"{100 * share:.1f} %", "5 %")


FIGURES: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "reference": _reference, "ntxent": _ntxent, "ingest": _ingest, "loader": _loader, "augment": _augment, "train": _train, "embed": _embed,
    "evaluate": _evaluate, "decode": _decode, "memory": _memory, "normalisation": _normalisation,
    "coverage": _coverage,
}  # fmt: skip

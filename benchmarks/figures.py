"""Makes what the repository says of its measurements from benchmarks/results/*.json: ``python benchmarks/figures.py [--check] [--pictures]``.

benchmarks/results/README.md gets every figure with its command, commit and machine; README.md, between two marks, the six that matter most to a
user; benchmarks/results/reference.md the report of `cellfast benchmark reference`. ``--check`` only says whether they agree (status 1 where they
do not); ``--pictures`` draws benchmarks/results/reference.png anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from figure_rows import FIGURES, aims, load_and_augment, number, other_name

from cellfast.benchmark import SUBJECTS
from cellfast.benchmark.reference.report import markdown, rows_of, side_names
from cellfast.errors import CellfastError

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: made by `make figures` from benchmarks/results/*.json -->", "<!-- end of figures -->"


def read_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Subject → document of ``*.json`` in ``folder``, in the order of `FIGURES`.

    Raises:
        CellfastError: none there, a file that is not a benchmark's result, one of a --quick run, or of an unknown subject.
    """
    documents = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            subject, quick = document["subject"], document["quick"]
            document["environment"]["system"], document["environment"]["commit"], document["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise CellfastError(
                f"{path}: expected a result of cellfast benchmark (subject, quick, environment, result): {error!r}"
            ) from error
        if quick:
            raise CellfastError(f"{path}: made with --quick, whose figures say little: measure it without")
        if subject not in FIGURES:
            raise CellfastError(f"{path}: no figures are known for {subject!r}: choose from {', '.join(FIGURES)}")
        documents[subject] = document
    if not documents:
        raise CellfastError(f"{folder}: no results; make them with `make bench`")
    return {subject: documents[subject] for subject in FIGURES if subject in documents}


def command_of(subject: str) -> str:
    """What measures it."""
    return f"cellfast benchmark {subject}" if subject in SUBJECTS else f"python benchmarks/bench_{subject}.py"


def long_table(results: dict[str, dict[str, Any]]) -> str:
    """benchmarks/results/README.md: every figure, with its command, commit and machine."""
    lines = [
        "# What was measured", "",
        "Made by `make figures` from the JSON files in this folder; `make bench` measures all of them anew. [benchmarks/README.md](../README.md) says how.",
        "Medians of repeats. On a virtual machine with neighbours figures vary from run to run, on its worst days by a factor of two: compare within a row,",
        "which was measured in one run.",
    ]  # fmt: skip
    for subject, document in results.items():
        result = document["result"]
        lines += ["", f"## `{command_of(subject)}`", "", f"{machine(document['environment'])}; commit {_commits(document)}."]
        lines += rows_of(
            ("what", "cellfast", "compared with"), ((row.what, row.cellfast, row.other) for row in FIGURES[subject](result))
        )
        if subject == "reference":
            lines += ["", "\"cellfast\" is `--recipe perakis2021` compared with a checkout of the reference, used as it is, on the same cells. All sides, quality and scaling: "
                      "[reference.md](reference.md).", "", "![How many times as fast each part is, and the memory of NT-Xent](reference.png)"]  # fmt: skip
            lines += rows_of(("aim", "", "measured", ""), aims(result))
    return "\n".join(lines) + "\n"


def six_figures(results: dict[str, dict[str, Any]]) -> str:
    """README.md's block: what matters most to a user, and the machine."""
    r = results["reference"]["result"]
    parts, s, theirs = r["parts"], r["settings"], other_name(r)

    def against(part: str) -> tuple[str, str, str]:
        names = side_names(parts[part])
        ours, other = (parts[part][names[side]]["cells_per_second"] for side in (0, -1))
        return number(ours), f"{theirs} {number(other)}", number(parts[part]["times_faster"])

    embed = results["embed"]["result"]
    rates = embed["cells_per_second"]
    losses = {(row["M"], row["D"]): row["peers"] for row in results["ntxent"]["result"]["rows"]}

    def loss(name: str) -> str:
        return " and ".join(f"{number(losses[m, 128][name]['forward_backward']['median_ms'])} ms" for m in (512, 8192))

    def gain(m: int) -> str:
        plain, here = (losses[m, 128][name]["forward_backward"]["median_ms"] for name in ("plain PyTorch", "cellfast"))
        return number(plain / here)

    ours, other = load_and_augment(parts)
    sizes = f"{s['encoder']}, {s['size']} px, minibatch {s['batch_size']}"
    rows = (
        (f"embedding from TIFF fields, {embed['encoder']}, {embed['output_size']} px, cells/s", number(rates["fields"]),
         f"the bare encoder {number(rates['bare encoder'])}", number(rates["fields"] / rates["bare encoder"]), "embed"),
        (f"training step, {sizes}, cells/s", *against("step"), "reference"),
        (f"the whole path, crops on disk to NSC and NSCB, {sizes}, cells/s", *against("end to end"), "reference"),
        ("NT-Xent, forward and backward, of 256 and of 4,096 cells", loss("cellfast"), f"plain PyTorch {loss('plain PyTorch')}", f"{gain(512)} and {gain(8192)}", "ntxent"),
        ("NSC and NSCB of 103 treatments, treatments/s", *against("evaluate"), "reference"),
        (f"loading and two views of each cell, {s['size']} px, cells/s", number(ours), f"{theirs} {number(other)}", number(ours / other), "reference"),
    )  # fmt: skip
    lines = [
        *rows_of(
            ("what", "cellfast", "compared with", "times as fast", "command"),
            ((*row[:4], f"`{command_of(row[4])}`") for row in rows),
        )
    ]
    machines = dict.fromkeys(machine(results[subject]["environment"]) for subject in ("reference", "embed", "ntxent"))
    return "\n".join([*lines[1:], "", f"Measured with {s['threads']} threads on {'; and on '.join(machines)}."])


def machine(environment: dict[str, Any]) -> str:
    """Processor, memory, GPUs and versions in words."""
    s = environment["system"]
    gpus = ", ".join(gpu["name"] for gpu in s["gpus"]) or "no GPU"
    bf16 = "" if s["bfloat16_native"] else ", no bfloat16 instructions"
    versions = ", ".join(f"{name} {s['packages'][name]}" for name in ("torch", "kornia") if name in s["packages"])
    return (
        f"{s['cpu']['name']}, {s['cpu']['cores']} cores{bf16}, {s['memory_bytes'] / 2**30:.0f} GiB, {gpus}; Python {s['python']}, "
        f"{versions}, cellfast {s['cellfast']}"
    )


def _commits(document: dict[str, Any]) -> str:
    """The commits its figures were measured at; ``-dirty``: with files changed."""
    parts = document["result"].get("parts", {})
    if not parts:
        return _short(document["environment"]["commit"])
    by_commit: dict[str, list[str]] = {}
    for name, entry in parts.items():
        by_commit.setdefault(_short(entry.get("commit", document["environment"]["commit"])), []).append(name)
    return (
        next(iter(by_commit))
        if len(by_commit) == 1
        else ", ".join(f"{commit} ({', '.join(of)})" for commit, of in by_commit.items())
    )


def _short(commit: str) -> str:
    return commit[:12] + "-dirty" * commit.endswith("-dirty") if commit else "unknown"


def with_block(text: str, block: str) -> str:
    """``text`` with everything between the two marks replaced by ``block``.

    Raises:
        CellfastError: the marks are not there exactly once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise CellfastError(f"README.md: expected the lines {BEGIN!r} and {END!r} once each, in this order")
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n" + block + "\n" + text[text.index(END) :]


def made(root: Path) -> dict[Path, str]:
    """File → what it is to hold."""
    folder, readme = root / "benchmarks" / "results", root / "README.md"
    results = read_results(folder)
    return {
        folder / "README.md": long_table(results),
        folder / "reference.md": markdown(results["reference"]),
        readme: with_block(readme.read_text(encoding="utf-8"), six_figures(results)),
    }


def draw(document: dict[str, Any], path: Path) -> None:
    """Bars of how many times as fast each part is, and the memory of NT-Xent against the minibatch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cellfast.atomic import atomic_path

    result = document["result"]
    parts = {name: entry["times_faster"] for name, entry in result["parts"].items() if "times_faster" in entry}
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    bars.bar_label(bars.barh(list(parts)[::-1], list(parts.values())[::-1], color="#30638e"), fmt="%.3g", padding=3)
    bars.set(
        xscale="log",
        xlim=(min(0.5, *parts.values()), 3 * max(parts.values())),
        xlabel=f"times as fast as the {result['other']['name']}",
    )
    bars.axvline(1, color="black", linewidth=0.8)
    for name, rows in result["scaling"]["minibatch"]["loss"].items():
        done = [row for row in rows if "median_seconds" in row]
        # Less than 1 MiB is less than what is measured.
        lines.loglog([r["minibatch"] for r in done], [max(r["growth_bytes"], 2**20) / 2**30 for r in done], "o-", label=name)
        stopped = [row for row in rows if "out_of_memory" in row]
        lines.plot([r["minibatch"] for r in stopped], [r["allowed_bytes"] / 2**30 for r in stopped], "x", color="black")
    lines.set(xlabel="cells per minibatch (x: out of memory)", ylabel="memory of NT-Xent, GiB")
    lines.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write the files, or with ``--check`` only say which do not agree with the results."""
    from cellfast.atomic import write_text

    arguments = sys.argv[1:] if arguments is None else arguments
    if unknown := sorted(set(arguments) - {"--check", "--pictures"}):
        print(f"unknown option {', '.join(unknown)}: choose from --check, --pictures", file=sys.stderr)
        return 2
    try:
        files = made(root)
    except CellfastError as error:
        print(error, file=sys.stderr)
        return 2
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(
                f"{path.relative_to(root)} does not agree with the JSON files in benchmarks/results: run `make figures`",
                file=sys.stderr,
            )
        return int(bool(stale))
    for path in stale:
        write_text(path, files[path])
    if "--pictures" in arguments:
        results = root / "benchmarks" / "results"
        draw(read_results(results)["reference"], results / "reference.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

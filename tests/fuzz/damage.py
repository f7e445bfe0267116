"""Damaged files: each mutant of a file goes to the command that reads it, and what became of it is counted.

By hand: ``python -m tests.fuzz.damage --mutants 1000 --kind parquet --seed 0 --keep bad/``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from . import material, runs
from .mutate import generator, mutate

OUTCOMES = ("same", "refused", "differs", "silent", "traceback", "crash", "hang", "memory")
BAD = ("silent", "traceback", "crash", "hang", "memory")
MEANING = """same: accepted, the result of the undamaged file; refused: exit 1, 2 or 3 with a sentence, or the field is refused in the ledger; differs: another result, of a file
that has no checksum (natural: other pixels, other cells); silent: another result though there is a checksum; traceback: any other
exception; crash: ended by a signal; hang: over the time limit; memory: more than 1 GiB, or out of memory"""
MEMORY_LIMIT, MEMORY_BAD = 4 << 30, 1 << 30
MUTANTS_PER_WORKER = 250


@dataclass(frozen=True)
class Kind:
    """A kind of file: which one is damaged, what else the command needs, the command, and the digest of its result."""

    name: str
    file: str
    needs: tuple[str, ...]
    arguments: Callable[[Path], Sequence[object]]
    digest: Callable[[Path, str], str]
    checksum: bool = False
    text: bool = False


def _ingest(table: str = "few.csv", root: str = "images", locations: str = "locations", *more: str) -> Callable:
    def arguments(case: Path) -> list[object]:
        extra = [case / m if (case / m).exists() else m for m in more]
        fields = material.fields_of(case, table, root, locations)
        return ["ingest", "fields", *fields, "--crop-size", material.CROP, "--workers", 1, "-o", case / "out", *extra]

    return arguments


def _embed(*source: str) -> Callable:
    def arguments(case: Path) -> list[object]:
        given = [case / source[0]] if len(source) == 1 else material.fields_of(case, *source)
        return ["embed", *given, "--model", case / "run" / "model.pt", "-o", case / "out", "--workers", 1, "--retries", 0]

    return arguments


def _profile(*inputs: str) -> Callable:
    def arguments(case: Path) -> list[object]:
        return ["profile", *(case / i if (case / i).exists() else i for i in inputs), "-o", case / "out.parquet"]

    return arguments


def _evaluate(case: Path) -> list[object]:
    few = ["--permutations", 20, "--no-pictures"]
    return ["evaluate", case / "profiles.parquet", "-o", case / "out.json", *few]


def _store(case: Path, output: str) -> str:
    return material.store_digest(case / "out")


def _rows(case: Path, output: str) -> str:
    return material.embeddings_digest(case / "out")


def _table(case: Path, output: str) -> str:
    return material.table_digest(case / "out.parquet")


def _weights(folder: str) -> Callable[[Path, str], str]:
    return lambda case, output: material.model_digest(case / folder)


def _text(case: Path, output: str) -> str:
    return output.replace(str(case), "")


def _described(case: Path, output: str) -> str:
    found = json.loads(output[output.index("\n{") :])
    return json.dumps({key: value for key, value in found.items() if "bytes" not in key and key != "created"}).replace(
        str(case), ""
    )


def _train(*more: object, out: str = "out") -> Callable:
    return lambda case: [
        "train", case / "few", "-o", case / out, *(case / m if str(m).endswith(".yaml") else m for m in more)
    ]  # fmt: skip


FIELDS = ("few.csv", "images", "locations")
FIRST, PLATE = "A01_s1", "Week1_P1"
CROPS = f"few/plates/{PLATE}.h5"
EPOCHS = (*material.TRAIN, 1)


def _kinds() -> Iterator[Kind]:
    yield Kind("tiff", f"images/{PLATE}/{FIRST}_DNA.tif", FIELDS, _ingest(), _store)
    yield Kind("tiff, deflated", f"images/{PLATE}/{FIRST}_Actin.tif", FIELDS, _ingest(), _store)
    yield Kind("tiff, embedded", f"images/{PLATE}/{FIRST}_DNA.tif", (*FIELDS, "run"), _embed("few.csv", "images"), _rows)
    yield Kind(
        "png", f"pngs/{PLATE}/{FIRST}_DNA.png", ("few_png.csv", "pngs", "locations"), _ingest("few_png.csv", "pngs"), _store
    )
    yield Kind("label mask", f"masks/{PLATE}/{FIRST}_DNA_cp_masks.tif", ("few.csv", "images", "masks"), _ingest("few.csv", "images", "masks"), _store)  # fmt: skip
    yield Kind("image csv", "few.csv", FIELDS, _ingest(), _store, text=True)
    yield Kind("image csv.gz", "few.csv.gz", ("few.csv.gz", *FIELDS[1:]), _ingest("few.csv.gz"), _store, text=True)
    yield Kind("image parquet", "few.parquet", ("few.parquet", *FIELDS[1:]), _ingest("few.parquet"), _store)
    yield Kind("centroid csv", f"locations/{PLATE}/A01-1-Nuclei.csv", FIELDS, _ingest(), _store, text=True)
    yield Kind("locations csv", "locations.csv", ("few.csv", "images", "locations.csv"), _ingest("few.csv", "images", "locations.csv"), _store, text=True)  # fmt: skip
    yield Kind("moa csv", "moa.csv", (*FIELDS, "moa.csv"), _ingest(*FIELDS, "--moa", "moa.csv"), _store, text=True)
    yield Kind("metadata csv", "all.csv", (*FIELDS, "all.csv"), _ingest(*FIELDS, "--metadata", "all.csv"), _store, text=True)
    yield Kind("illumination npy", "illumination/DNA.npy", (*FIELDS, "illumination"), _ingest(*FIELDS, "--illumination", "illumination"), _store)  # fmt: skip
    yield Kind("crop index csv", "crops/index.csv", ("crops",), _crops, _store, text=True)
    yield Kind("crop npy", f"crops/{PLATE}_A01_1.npy", ("crops",), _crops, _store)
    yield Kind("npz", f"deepprofiler/{PLATE}/A01/1.npz", ("deepprofiler", "all.csv"), _profile("deepprofiler", "--metadata", "all.csv"), _table)  # fmt: skip
    yield Kind("features parquet", "features.parquet", ("features.parquet",), _profile("features.parquet"), _table)
    yield Kind("features csv.gz", "features.csv.gz", ("features.csv.gz",), _profile("features.csv.gz"), _table, text=True)
    yield Kind("crop store, embed", CROPS, ("few", "run"), _embed("few"), _rows, checksum=True)
    yield Kind("crop store, train", CROPS, ("few",), _train(*EPOCHS), _weights("out"), checksum=True)
    yield Kind("crop store, info", CROPS, ("few",), lambda case: ["info", case / "few", "--verify", "--json"], _described, checksum=True)  # fmt: skip
    yield Kind("field store, embed", "FIELDS.h5", ("few.csv", "FIELDS.h5", "locations", "run"), _embed("few.csv", "FIELDS.h5"), _rows, checksum=True)  # fmt: skip
    yield Kind("field store, ingest", "FIELDS.h5", ("few.csv", "FIELDS.h5", "locations"), _ingest("few.csv", "FIELDS.h5"), _store, checksum=True)  # fmt: skip
    yield Kind("ledger.json", "few/ledger.json", ("few", "run"), _embed("few"), _rows, text=True)
    yield Kind("model.pt", "run/model.pt", ("few", "run"), _embed("few"), _rows, checksum=True)
    yield Kind(
        "last.pt",
        "half/checkpoints/last.pt",
        ("few", "half"),
        _train("--resume", out="half"),
        _weights("half"),
        checksum=True,
    )
    yield Kind("config.yaml, new", "half/config.yaml", ("few", "half"), _train("--config", "half/config.yaml"), _weights("out"), text=True)  # fmt: skip
    yield Kind("config.yaml, resumed", "half/config.yaml", ("few", "half"), _train("--resume", out="half"), _weights("half"), text=True)  # fmt: skip
    yield Kind("pt2", "model.pt2", ("model.pt2",), lambda case: ["info", case / "model.pt2"], _text)
    yield Kind("block", "blocks", ("few", "run", "blocks"), _embed_on, _rows, checksum=True)
    yield Kind(
        "embeddings parquet", f"embeddings/{PLATE}.parquet", ("embeddings",), _profile("embeddings"), _table, checksum=True
    )
    yield Kind("embeddings.json", "embeddings/embeddings.json", ("embeddings",), _profile("embeddings"), _table, text=True)
    yield Kind("profiles parquet", "profiles.parquet", ("profiles.parquet",), _evaluate, lambda case, output: (case / "out.json").read_text())  # fmt: skip


def _crops(case: Path) -> list[object]:
    return ["ingest", "crops", case / "crops" / "index.csv", "-o", case / "out"]


def _embed_on(case: Path) -> list[object]:
    shutil.move(case / "blocks", case / "out")
    return _embed("few")(case)


KINDS = {kind.name: kind for kind in _kinds()}


def damaged_file(kind: Kind, base: Path, index: int) -> str:
    """The file of mutant ``index``, relative to the case; of a folder of blocks each in turn."""
    if kind.name != "block":
        return kind.file
    files = sorted(p for p in (base / "blocks" / ".embed" / "blocks").rglob("*") if p.is_file())
    return str(files[index % len(files)].relative_to(base))


def mutant(kind: Kind, base: Path, seed: int, index: int) -> tuple[str, str, bytes, bytes]:
    """(file, name of the mutation, bytes before, bytes after)."""
    file = damaged_file(kind, base, index)
    before = (base / file).read_bytes()
    name, after = mutate(before, generator(kind.name, seed, index), text=kind.text, zipped=file.endswith(".gz"))
    return file, name, before, after


def _lay_out(kind: Kind, base: Path, case: Path) -> None:
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    for name in kind.needs:
        if (base / name).is_dir():
            shutil.copytree(base / name, case / name)
        else:
            shutil.copy(base / name, case / name)


def _attack(kind: Kind, base: Path, case: Path, expected: str | None, file: str, content: bytes) -> tuple[str, str, str]:
    """(outcome, where, what) of one mutant; with ``expected`` None the digest of the undamaged file stands in for the outcome."""
    _lay_out(kind, base, case)
    (case / file).write_bytes(content)
    before = runs.peak_memory(reset=True)
    ended = runs.command([str(a) for a in kind.arguments(case)])
    grown = runs.peak_memory() - before
    if ended.memory or grown > MEMORY_BAD:
        return "memory", ended.where, f"{grown / 1e9:.1f} GB; {ended.error or ended.output[-200:]}"
    if ended.error:
        return "traceback", ended.where, ended.error
    if ended.status:
        if "Traceback (most" in ended.output or not ended.output.strip():
            return "traceback", "printed", ended.output[-300:]
        return "refused", "", ended.output.strip().splitlines()[-1]
    try:
        found = kind.digest(case, ended.output)
    except Exception as error:
        found = f"the result cannot be read: {type(error).__name__}: {error}"
    if expected is None:
        return found, "", ""
    if found == expected:
        return "same", "", ""
    refused = _fields_refused(case / "out")
    if kind.checksum and refused:
        return "refused", "", f"counted in the ledger: {refused}"
    return ("silent" if kind.checksum else "differs"), "", found[:200]


def _fields_refused(screen: Path) -> dict[str, int]:
    """Fields that an ingest refused, by reason, from its ledger; none where there is no ledger."""
    try:
        return json.loads((screen / "ledger.json").read_text())["totals"]["fields_refused"]
    except (OSError, KeyError):
        return {}


def work(kind_name: str, base: str, case: str, seed: int, pipe: Connection) -> None:
    """The body of a worker: the undamaged file first, then the mutants it is told of, one answer for each."""
    kind, base_path = KINDS[kind_name], Path(base)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    if kind_name == "block" and not (base_path / "blocks").exists():
        raise AssertionError("no blocks")
    runs.limit_memory(MEMORY_LIMIT)
    expected = None
    while (index := pipe.recv()) is not None:
        if index < 0:
            file = damaged_file(kind, base_path, 0)
            expected, _, what = _attack(kind, base_path, Path(case), None, file, (base_path / file).read_bytes())
            pipe.send((expected, what, ""))
            continue
        file, _, before, after = mutant(kind, base_path, seed, index)
        pipe.send(("unchanged", "", "") if before == after else _attack(kind, base_path, Path(case), expected, file, after))


class Worker:
    """A forked process that tries mutants, watched: it may crash, hang, and be replaced."""

    def __init__(self, kind: Kind, base: Path, case: Path, seed: int, limit_s: float) -> None:
        self.given = (kind.name, str(base), str(case), seed)
        self.limit_s, self.process, self.tried = limit_s, None, 0

    def attack(self, index: int) -> tuple[str, str, str]:
        """What became of mutant ``index``."""
        if self.process is None or self.tried >= MUTANTS_PER_WORKER:
            self.stop()
            context = runs.context()
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(*self.given, theirs))
            self.process.start()
            theirs.close()
            self.tried = 0
            self._ask(-1, 10 * self.limit_s)
        self.tried += 1
        return self._ask(index, self.limit_s)

    def _ask(self, index: int, limit_s: float) -> tuple[str, str, str]:
        try:
            self.pipe.send(index)
            if self.pipe.poll(limit_s):
                return self.pipe.recv()
            outcome = ("hang", "", f"more than {limit_s:g} s")
        except (EOFError, OSError):
            self.process.join()
            outcome = ("crash", "", f"ended with {self.process.exitcode}")
        self.stop()
        if index < 0:
            raise RuntimeError(f"{self.given[0]}: the undamaged file: {outcome}")
        return outcome

    def stop(self) -> None:
        """End the process, also one that hangs."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


@dataclass(frozen=True)
class Mutant:
    """One mutant and what became of it."""

    kind: str
    index: int
    mutation: str
    outcome: str
    where: str
    what: str


def prepare(folder: Path) -> Path:
    """The undamaged files, made by the commands themselves in processes of their own, and runs of embed and train that were killed."""
    base, context = folder / "base", runs.context()
    if not base.exists():
        _in_process(context, material.make, base)
        embed = [str(a) for a in _embed("few")(base)]
        train = ["train", str(base / "few"), "-o", str(base / "half"), *map(str, EPOCHS[:-1]), "3"]
        for arguments, die_at in ((embed, (".parquet", 1, False)), (train, ("last.pt", 4, True))):
            _in_process(context, runs.run_and_exit, arguments, str(folder / "log"), die_at, status=-9)
        (base / "out").rename(base / "blocks")
    return base


def _in_process(context: object, body: Callable, *given: object, status: int = 0) -> None:
    process = context.Process(target=body, args=given)
    process.start()
    process.join()
    if process.exitcode != status:
        raise RuntimeError(f"preparing the files: {body.__name__} ended with {process.exitcode}, expected {status}")


def run(
    kinds: Sequence[str], mutants: int, seed: int, folder: Path, *, limit_s: float = 60, keep: Path | None = None, first: int = 0
) -> list[Mutant]:
    """Try ``mutants`` mutants of each kind; bad ones are written to ``keep``."""
    base, found = prepare(folder), []
    for name in kinds:
        kind, began = KINDS[name], time.monotonic()
        worker = Worker(kind, base, folder / f"case {name}", seed, limit_s)
        try:
            for index in range(first, first + mutants):
                outcome, where, what = worker.attack(index)
                file, mutation, _, content = mutant(kind, base, seed, index)
                if outcome == "unchanged":
                    continue
                found.append(Mutant(name, index, mutation, outcome, where, what))
                if outcome in BAD and keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{name} {seed} {index} {outcome} {Path(file).name}".replace(" ", "-")).write_bytes(content)
        finally:
            worker.stop()
        counts = Counter(m.outcome for m in found if m.kind == name)
        told = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
        print(f"{name}: {told} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
    return found


def table(found: Sequence[Mutant]) -> str:
    """Counts by kind and outcome, then the causes of the bad ones."""
    counts = Counter((m.kind, m.outcome) for m in found)
    kinds = list(dict.fromkeys(m.kind for m in found))
    lines = [f"{'':<22}{'tried':>8}" + "".join(f"{o:>10}" for o in OUTCOMES)]
    for kind in kinds:
        row = [counts[kind, outcome] for outcome in OUTCOMES]
        lines.append(f"{kind:<22}{sum(row):>8}" + "".join(f"{n or '.':>10}" for n in row))
    totals = [sum(counts[kind, outcome] for kind in kinds) for outcome in OUTCOMES]
    lines += [f"{'all':<22}{sum(totals):>8}" + "".join(f"{n or '.':>10}" for n in totals), "", MEANING]
    causes: dict[tuple[str, str, str, str], list[Mutant]] = {}
    for m in found:
        if m.outcome in BAD:
            what = "" if m.outcome == "silent" else " ".join(m.what.split())[:110]
            causes.setdefault((m.kind, m.outcome, m.where, "" if m.where else what), []).append(m)
    for (kind, outcome, where, _), those in sorted(causes.items(), key=lambda item: (item[0][0], -len(item[1]))):
        example = those[0]
        text = " ".join(example.what.split())[:200]
        lines.append(f"{len(those):>5}  {kind}: {outcome} {where}  e.g. mutant {example.index} ({example.mutation}): {text}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; exit status 1 where a mutant was bad."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.damage", description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=1000, help="of each kind of file (default: 1000)")
    parser.add_argument("--kind", action="append", help="only kinds whose name has this in it; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant: one alone with --mutants 1")
    parser.add_argument("--limit", type=float, default=60, help="seconds a mutant may take (default: 60)")
    parser.add_argument("--keep", type=Path, help="folder for the bytes of bad mutants, named by kind, seed and number")
    parser.add_argument(
        "--folder", type=Path, help="work here, and find the undamaged files of an earlier call (default: temporary)"
    )
    given = parser.parse_args(arguments)
    kinds = [name for name in KINDS if not given.kind or any(part in name for part in given.kind)]
    if not kinds:
        parser.error(f"no such kind; the kinds are: {'; '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="cellfast-damage-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(kinds, given.mutants, given.seed, folder, limit_s=given.limit, keep=given.keep, first=given.first)
    print(table(found))
    return int(any(m.outcome in BAD for m in found))


if __name__ == "__main__":
    sys.exit(main())

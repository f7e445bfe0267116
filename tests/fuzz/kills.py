"""Killed runs: a command is killed at a random moment, run again, and its result compared with that of a run that nothing disturbed.

By hand: ``python -m tests.fuzz.kills --kills 100 --command embed --seed 0``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import material, runs

OUTCOMES = ("equal", "lost", "doubled", "different", "leftovers", "refused", "traceback", "hang")
MEANING = """equal: the run after the kill ended well, and its result is that of an undisturbed run, bit for bit; lost, doubled: cells;
different: other rows, or other files; leftovers: files an undisturbed run does not have; refused: the run after the kill ended with
an error; traceback: in the run that was told to end, or in the next; hang: over the time limit, or alive after SIGTERM or SIGINT"""
KEYS = ["Metadata_Plate", "Metadata_Well", "Metadata_Site", "Metadata_ObjectNumber"]
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM, signal.SIGINT)
LIMIT_S = 120


@dataclass(frozen=True)
class Command:
    """A command that is killed: its arguments for an output, what is added the second time, and how a result is read."""

    name: str
    arguments: Callable[[Path, Path], list[object]]
    rows: Callable[[Path], Any]
    again: tuple[str, ...] = ()


def _ingest_fields(base: Path, out: Path) -> list[object]:
    cut = ["--crop-size", material.CROP, "--workers", 1, "--moa", base / "moa.csv"]
    return ["ingest", "fields", *material.fields_of(base), *cut, "-o", out]


def _ingest_processes(base: Path, out: Path) -> list[object]:
    return [2 if a == 1 else a for a in _ingest_fields(base, out)]


def _ingest_crops(base: Path, out: Path) -> list[object]:
    return ["ingest", "crops", base / "crops" / "index.csv", "-o", out]


def _embed(base: Path, out: Path, *source: object) -> list[object]:
    given = source or (base / "store",)
    return ["embed", *given, "--model", base / "run" / "model.pt", "-o", out, "--batch-size", 16, "--threads", 1, "--workers", 1]


def _embed_fields(base: Path, out: Path) -> list[object]:
    return _embed(base, out, *material.fields_of(base))


def _train(base: Path, out: Path) -> list[object]:
    return ["train", base / "few", "-o", out, *material.TRAIN, 8]


def _profile(base: Path, out: Path) -> list[object]:
    return ["profile", base / "embeddings", "-o", out / "profiles.parquet", "--wells-output", out / "wells.parquet"]


def _cells_of_store(out: Path) -> Any:
    import numpy as np
    import pandas as pd

    from cellfast.screens import Screen

    frames = []
    for store in Screen.open(out).plates:
        pixels = np.ascontiguousarray(store.crops()).reshape(store.num_cells, -1)
        scaling = repr((store.batch, store.channel_names, store.scale_low.tolist(), store.scale_high.tolist()))
        frames.append(store.metadata().assign(pixels=[row.tobytes() for row in pixels], scaling=scaling))
    ledger = json.loads((out / "ledger.json").read_text())
    return pd.concat(frames, ignore_index=True).assign(ledger=_plain(ledger, out))


def _rows_of_embeddings(out: Path) -> Any:
    import pandas as pd
    import pyarrow.parquet as pq

    ledger = json.loads((out / "embeddings.json").read_text())
    for key in ("decode", "notes"):  # of the last run: one that finds all plates finished has nothing to decode
        ledger.pop(key, None)
    ledger = _plain(ledger, out)
    return pd.concat([pq.read_table(p).to_pandas() for p in sorted(out.glob("[!.]*.parquet"))], ignore_index=True).assign(
        ledger=ledger
    )


def _weights(out: Path) -> Any:
    import pandas as pd

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    return pd.DataFrame(
        {"model": [material.model_digest(out)], "config": (out / "config.yaml").read_text(), "steps": repr(steps)}
    )


def _profiles(out: Path) -> Any:
    import pandas as pd

    report = _plain(json.loads((out / "profiles.report.json").read_text()), out)
    return pd.DataFrame({p.name: [material.table_digest(p)] for p in sorted(out.glob("[!.]*.parquet"))}).assign(report=report)


def _plain(value: Any, out: Path) -> str:
    """JSON without what differs from run to run: times, sizes of compressed files, the output's own name."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            volatile = ("created", "seconds", "bytes", "digest", "sha", "crc", "checksum", "time")
            return {k: strip(v) for k, v in value.items() if not any(word in k.lower() for word in volatile)}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return json.dumps(strip(value), sort_keys=True).replace(str(out), "OUT")


COMMANDS = {
    command.name: command
    for command in (
        Command("ingest fields", _ingest_fields, _cells_of_store),
        Command("ingest fields, 2 processes", _ingest_processes, _cells_of_store),
        Command("ingest crops", _ingest_crops, _cells_of_store),
        Command("embed store", _embed, _rows_of_embeddings),
        Command("embed fields", _embed_fields, _rows_of_embeddings),
        Command("train", _train, _weights, ("--resume",)),
        Command("profile", _profile, _profiles),
    )
}


@dataclass(frozen=True)
class Kill:
    """One try: how the run was killed, and what became of the result."""

    command: str
    index: int
    how: str
    outcome: str
    what: str


class Attack:
    """A command, its undisturbed run, and tries at killing it."""

    def __init__(self, command: Command, base: Path, folder: Path, seed: int) -> None:
        self.command, self.base, self.folder, self.seed = command, base, folder, seed
        self.context = runs.context()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clean = self.folder / "clean"
        shutil.rmtree(self.clean, ignore_errors=True)
        counted, log = self.folder / "renames", self.folder / "clean.log"
        log.unlink(missing_ok=True)
        self._run(self.clean, [], log)  # warms what is kept between runs
        shutil.rmtree(self.clean, ignore_errors=True)
        process, began = self._start(self.clean, [], log, counted), time.monotonic()
        process.join()
        self.duration = time.monotonic() - began
        if process.exitcode:
            raise RuntimeError(f"{command.name}: the undisturbed run ended with {process.exitcode}\n{log.read_text()[-2000:]}")
        self.renames = int(counted.read_text()) if counted.exists() else 0
        self.expected = command.rows(self.clean)
        self.files = names(self.clean)

    def _start(self, out: Path, more: Sequence[str], log: Path, counted: Path | None = None, die_at: Any = None) -> Any:
        arguments = [str(a) for a in self.command.arguments(self.base, out)] + list(more)
        body, last = (runs.run_and_exit, die_at) if counted is None else (runs.count_renames, str(counted))
        process = self.context.Process(target=body, args=(arguments, str(log), last))
        process.start()
        return process

    def _run(self, out: Path, more: Sequence[str], log: Path) -> int | None:
        """A run to its end; None: it hung."""
        process = self._start(out, more, log)
        process.join(LIMIT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None
        return process.exitcode

    def attempt(self, index: int) -> Kill:
        """Kill a run (now and then twice), run it again, compare."""
        rng = random.Random(f"{self.command.name} {self.seed} {index}")
        out, log = self.folder / f"out{index}", self.folder / f"{index}.log"
        shutil.rmtree(out, ignore_errors=True)
        log.unlink(missing_ok=True)
        told, how = [], []
        for number in range(1 + (rng.random() < 0.2)):
            text, wrong = self._killed(out, self.command.again if number else (), log, rng)
            how.append(text)
            told += [wrong] if wrong else []
        outcome, what = told[0] if told else ("", "")
        if not outcome:
            more = self.command.again if out.exists() else ()
            status = self._run(out, more, log)
            text = log.read_text()
            if status is None:
                outcome, what = "hang", f"the run after the kill took more than {LIMIT_S} s"
            elif status:
                outcome = "traceback" if "Traceback (most" in text else "refused"
                what = text.strip().splitlines()[-1] if text.strip() else f"exit status {status}"
            else:
                outcome, what = self._compare(out)
        if outcome == "equal":
            shutil.rmtree(out, ignore_errors=True)
            log.unlink(missing_ok=True)
        return Kill(self.command.name, index, ", then ".join(how), outcome, what)

    def _killed(self, out: Path, more: Sequence[str], log: Path, rng: random.Random) -> tuple[str, tuple[str, str] | None]:
        """(how, what went wrong already)."""
        if self.renames and rng.random() < 0.4:
            number, after = rng.randint(1, self.renames), rng.random() < 0.5
            process = self._start(out, more, log, die_at=("", number, after))
            process.join(LIMIT_S)
            how = f"{'after' if after else 'before'} rename {number} of {self.renames}"
        else:
            sent, delay = rng.choice(SIGNALS), rng.uniform(0, self.duration)
            process = self._start(out, more, log)
            process.join(delay)
            how = f"{signal.Signals(sent).name} after {delay:.2f} of {self.duration:.2f} s"
            if process.exitcode is None:
                os.kill(process.pid, sent)
            else:
                how += " (had ended)"
            process.join(LIMIT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            return how, ("hang", "the run did not end when it was told to")
        text = log.read_text() if log.exists() else ""
        if "Traceback (most" in text:
            return how, ("traceback", text.strip().splitlines()[-1])
        return how, None

    def _compare(self, out: Path) -> tuple[str, str]:
        try:
            found = self.command.rows(out)
        except Exception as error:
            return "different", f"the result cannot be read: {type(error).__name__}: {error}"
        if set(KEYS) <= set(found.columns):
            expected, got = (Counter(map(tuple, table[KEYS].to_numpy().tolist())) for table in (self.expected, found))
            if missing := expected - got:
                return "lost", f"{sum(missing.values())} cells, such as {next(iter(missing))}"
            if more := got - expected:
                return "doubled", f"{sum(more.values())} cells, such as {next(iter(more))}"
        if list(found.columns) != list(self.expected.columns):
            return "different", "other columns"
        wrong = [name for name in found if not identical(found[name], self.expected[name])]
        if wrong:
            return "different", f"in {len(wrong)} of {len(found.columns)} columns, such as {wrong[0]}"
        left, gone = sorted(names(out) - self.files), sorted(self.files - names(out))
        if gone:
            return "different", f"not there: {', '.join(gone[:3])}"
        return ("leftovers", ", ".join(left[:3])) if left else ("equal", "")


def identical(one: Any, two: Any) -> bool:
    """Whether two columns have the same values, bit for bit."""
    one, two = one.to_numpy(), two.to_numpy()
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return one.tolist() == two.tolist() if one.dtype == object else one.tobytes() == two.tobytes()


def names(out: Path) -> set[str]:
    """The files of a result; TensorBoard's carry the time in their names."""
    return {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and "tensorboard" not in p.parts}


def run(commands: Sequence[str], kills: int, seed: int, folder: Path, *, first: int = 0) -> list[Kill]:
    """Try ``kills`` kills of each command."""
    context, base, found = runs.context(), folder / "base", []
    if not base.exists():
        process = context.Process(target=material.make, args=(base,))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"preparing the files ended with {process.exitcode}")
    for name in commands:
        began, attack = time.monotonic(), Attack(COMMANDS[name], base, folder / name.replace(" ", "-"), seed)
        mine = [attack.attempt(index) for index in range(first, first + kills)]
        counts = Counter(kill.outcome for kill in mine)
        told = ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o])
        print(f"{name}: {told} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
        found += mine
    return found


def table(found: Sequence[Kill]) -> str:
    """Counts by command and outcome, then the bad ones."""
    counts = Counter((kill.command, kill.outcome) for kill in found)
    commands = list(dict.fromkeys(kill.command for kill in found))
    lines = [f"{'':<28}{'kills':>7}" + "".join(f"{o:>11}" for o in OUTCOMES)]
    for command in commands:
        row = [counts[command, outcome] for outcome in OUTCOMES]
        lines.append(f"{command:<28}{sum(row):>7}" + "".join(f"{n or '.':>11}" for n in row))
    lines += ["", MEANING]
    lines += [f"{k.command}, try {k.index}: {k.outcome}: {k.what} ({k.how})" for k in found if k.outcome != "equal"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; exit status 1 where a result was not equal."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each command (default: 100)")
    parser.add_argument("--command", action="append", help="only commands whose name has this in it; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first try: one alone with --kills 1")
    parser.add_argument("--folder", type=Path, help="work here, and leave results that are not equal (default: temporary)")
    given = parser.parse_args(arguments)
    commands = [name for name in COMMANDS if not given.command or any(part in name for part in given.command)]
    if not commands:
        parser.error(f"no such command; the commands are: {'; '.join(COMMANDS)}")
    with tempfile.TemporaryDirectory(prefix="cellfast-kills-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = run(commands, given.kills, given.seed, folder, first=given.first)
    print(table(found))
    return int(any(kill.outcome != "equal" for kill in found))


if __name__ == "__main__":
    sys.exit(main())

"""Damaged files and killed runs: a short form of `fuzz.damage` and `fuzz.kills`, and a longer one; by hand they go on as long as asked."""

from __future__ import annotations

import pytest
from fuzz import damage, kills
from fuzz.mutate import generator, mutate

SHORT = ("image csv.gz", "features csv.gz", "crop store, embed", "field store, embed", "block", "embeddings parquet", "last.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both work: the undamaged files are made once."""
    return tmp_path_factory.mktemp("fuzz")


def test_a_seed_gives_the_same_mutants():
    content = bytes(range(256)) * 40
    for index in range(200):
        one, two = (mutate(content, generator("tiff", 0, index), text=True) for _ in range(2))
        assert one == two
    assert len({mutate(content, generator("tiff", 0, index))[1] for index in range(200)}) > 150


def check(found, bad, table):
    wrong = [one for one in found if one.outcome in bad]
    assert not wrong, table(found)


def test_damaged_files_end_in_a_sentence_and_never_in_other_results(folder):
    found = damage.run(SHORT, 4, 0, folder)
    assert len(found) >= 3 * len(SHORT)
    check(found, damage.BAD, damage.table)


def test_a_killed_run_is_made_whole_by_the_next(folder):
    found = kills.run(["embed store", "ingest crops"], 3, 0, folder)
    assert len(found) == 6
    check(found, set(kills.OUTCOMES) - {"equal"}, kills.table)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(damage.KINDS))
def test_many_damaged_files(folder, kind):
    check(damage.run([kind], 100, 1, folder), damage.BAD, damage.table)


@pytest.mark.slow
@pytest.mark.parametrize("command", list(kills.COMMANDS))
def test_many_killed_runs(folder, command):
    check(kills.run([command], 10, 1, folder), set(kills.OUTCOMES) - {"equal"}, kills.table)

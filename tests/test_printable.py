"""What is shown and written: no secrets, nothing that a terminal obeys; pictures show names as they are."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from cellfast.atomic import write_json
from cellfast.cli import main
from cellfast.errors import CellfastError
from cellfast.printable import escaped, masked
from cellfast.profiles import plots
from cellfast.progress import Progress
from cellfast.screens.image_table import Field
from cellfast.screens.ingest_fields import field_table_digest
from cellfast.screens.ledger import Ledger, PlateLedger
from cellfast.storage import urls

SECRET = "hunter2/PW+x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://user:{SECRET}@host/key: denied", "s3://user:***@host/key: denied"),
        (f"s3:/user:{SECRET}@host", "s3:/user:***@host"),
        (f"simplecache::s3://user:{SECRET}@host", "simplecache::s3://user:***@host"),
        (f"https://h/a.tif?X-Amz-Signature={SECRET}&id=12", "https://h/a.tif?X-Amz-Signature=***&id=12"),
        (f"https://h/a.tif?sv=2020&sig={SECRET}", "https://h/a.tif?sv=2020&sig=***"),
        (f"https://h/a?unknown={SECRET}&file=a.tif", "https://h/a?unknown=***&file=a.tif"),
        (f"gs://bucket/x,key={SECRET},secret={SECRET}", "gs://bucket/x,key=***,secret=***"),
        (f"{{'aws_secret_access_key': '{SECRET}', 'anon': 'False'}}", "{'aws_secret_access_key': '***', 'anon': 'False'}"),
        (f"Authorization: Bearer {SECRET}==", "Authorization: Bearer ***"),
        (f"<StringToSign>{SECRET}</StringToSign>", "<StringToSign>***</StringToSign>"),
        ("the key AKIAIOSFODNN7EXAMPLE does not exist", "the key AKIA*** does not exist"),
        # Nothing secret in these.
        ("s3://bucket/plate=P1/A01.tif", None),
        ("abfs://container@account.dfs.core.windows.net/x", None),
        ("Metadata_Compound == 'DMSO' @ 0.3 µM; key: 5", None),
        ("http://localhost:8080/a.tif", None),
        ("/data/a.tif: no such file", None),
    ],
)
def test_secrets_are_masked_and_only_they(text, shown):
    assert masked(text) == (text if shown is None else shown)
    assert masked(masked(text)) == masked(text)
    assert SECRET not in str(CellfastError(text))


def test_what_a_terminal_obeys_is_escaped():
    assert escaped("a\x1b[31m\n\u202e\x9bb\ud800µ化") == r"a\x1b[31m\n\u202e\u009bb\ud800µ化"
    assert str(CellfastError("plate 'a\nb\x1b'")) == r"plate 'a\nb\x1b'"


def test_what_is_written_has_no_secrets(tmp_path):
    url = f"s3://user:{SECRET}@host/a"
    plate = PlateLedger("P1", fields_listed=1)
    plate.refuse_field("file missing", "A01\x1b[2J", f"{url}: no such file\nError: forged")
    ledger = Ledger(url, url, {"root": url}, [plate], notes=[f"see {url}"])
    ledger.write(tmp_path)
    written = (tmp_path / "ledger.json").read_text()
    assert SECRET not in written
    assert json.loads(written)["options"]["root"] == "s3://user:***@host/a"
    table = ledger.table()
    assert SECRET not in table
    assert "\x1b" not in table
    assert "\nError: forged" not in table
    write_json(tmp_path / "x.json", {url: [1, None, True, (url,)]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"s3://user:***@host/a": [1, None, True, ["s3://user:***@host/a"]]}


def test_a_new_signature_is_no_new_file():
    def field(file):
        return [Field("P1", "A01", 1, 1, (file,))]

    one, other, third = (f"https://h/{name}.tif?X-Amz-Signature={sign}" for name, sign in (("a", 1), ("a", 2), ("b", 1)))
    assert field_table_digest(field(one)) == field_table_digest(field(other)) != field_table_digest(field(third))
    assert field_table_digest(field("https://h/x?id=abcdefghijk")) != field_table_digest(field("https://h/x?id=abcdefghijl"))


def test_errors_of_object_stores_are_masked(monkeypatch):
    fsspec = pytest.importorskip("fsspec")

    class Failing:
        def cat_file(self, path):
            raise KeyError(f"Invalid bucket name {path}")

        def ls(self, path, detail):
            raise PermissionError(f"signed with {SECRET}")

        def isfile(self, path):
            raise FileNotFoundError(path)

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Failing(), url.split("://")[1]))
    fs, path = urls.file_system(f"s3://user:{SECRET}@host/a")
    for kind, call in (
        (OSError, lambda: fs.cat_file(path)),
        (PermissionError, lambda: fs.ls(path, detail=False)),
        (FileNotFoundError, lambda: fs.isfile(path)),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert SECRET not in str(caught.value)
        assert caught.value.__suppress_context__


def test_the_command_line_masks_and_escapes_whatever_is_printed(monkeypatch, capsys):
    for argument in (f"s3://user:{SECRET}@host/x", "a\x1b[31m\nError: forged"):
        monkeypatch.setattr(sys, "argv", ["cellfast", "info", argument])
        with pytest.raises(SystemExit):
            main()
        said = "".join(capsys.readouterr())
        assert "Error:" in said
        assert SECRET not in said
        assert "\x1b" not in said
        assert "\nError: forged" not in said


def test_a_defect_is_told_without_secrets(monkeypatch, capsys):
    import cellfast.screens

    def fail(path, **options):
        raise RuntimeError(f"s3://user:{SECRET}@host/\x1b[31m")

    monkeypatch.setattr(cellfast.screens.Screen, "open", fail)
    monkeypatch.setattr(sys, "argv", ["cellfast", "info", "x"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "RuntimeError: s3://user:***@host" in said
    assert "\x1b" not in said


def test_progress_is_one_line(capsys):
    with Progress("ingest", 1, "fields") as progress:
        progress.message(f"plate a\nb\x1b s3://u:{SECRET}@h")
        progress.advance(1, "note\x1b\n")
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert "\x1b" not in said
    assert SECRET not in said


@pytest.mark.parametrize("usetex", [False, True])
def test_names_in_pictures_are_shown_as_they_are(tmp_path, usetex, monkeypatch):
    import matplotlib

    names = ["$\\bad{$", "_hidden", "a$b$c", "x\ny", "\u202eabc", "化合物", "", "L" * 5000, "\x1b[31m", "\\input{x}", "$"]
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", usetex)
    shown = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (shown.append(figure), save(figure, path)))
    labels = np.array(names * 2, dtype=object)
    plots._scatter(tmp_path / "map.png", np.random.default_rng(0).random((len(labels), 2)), labels, "MoA", "t", verdicts=False)
    counts = np.eye(len(names), dtype=int).tolist()
    score = {"confusion": {"moas": names, "counts": counts}, "accuracy": 1.0, "num_correct": 2, "num_evaluated": 2}
    plots._confusion(tmp_path / "confusion.png", score, "nsc")
    legend = [text.get_text() for text in shown[0].axes[0].get_legend().get_texts()]
    assert len(legend) == len(names)
    for text in ("$\\bad{$ (2)", "_hidden (2)", "x\\ny (2)", "(none) (2)"):
        assert text in legend
    assert "$\\bad{$" in [text.get_text() for text in shown[1].axes[0].get_xticklabels()]
    assert (tmp_path / "map.png").stat().st_size > 1000

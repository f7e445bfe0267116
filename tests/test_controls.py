"""The language of --controls: the rows that pandas gave, and nothing but conditions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellfast.errors import CellfastError
from cellfast.metadata.controls import select_rows
from cellfast.profiles.annotate import find_controls

TABLE = pd.DataFrame(
    {
        "Metadata_Compound": pd.Series(["DMSO", "x", "taxol b", "x", ""], dtype="str"),
        "Metadata_Concentration": [np.nan, 0.1, 0.3, 3.0, 1.0],
        "Metadata_Plate": pd.Series(["p1", "p1", "p2", "p2", "x"], dtype="str"),
        "Metadata_pert type": ["neg", None, "trt", "trt", "neg"],
        "Metadata_flag": [True, False, True, False, True],
        "Metadata_n": [1, 2, 3, 4, 5],
    }
).set_axis([7, 8, 9, 10, 11])


@pytest.mark.parametrize(
    "query",
    [
        "Metadata_Compound == 'DMSO'",
        'Metadata_Compound == "DMSO"',
        "'DMSO' == Metadata_Compound",
        "Metadata_Compound != 'DMSO'",
        "Metadata_Compound in ['DMSO', 'x']",
        "Metadata_Compound not in ('x', 'DMSO')",
        "Metadata_Compound == ['x', 'DMSO']",
        "0.1 < Metadata_Concentration <= 3",
        "Metadata_Concentration > -1e-1",
        "`Metadata_pert type` == 'neg'",
        "Metadata_flag",
        "~Metadata_flag",
        "not Metadata_flag",
        "Metadata_flag == True",
        "Metadata_Compound == 'x' & Metadata_n > 2",
        "Metadata_n >= 2 | Metadata_n < 1",
        "~(Metadata_n > 2)",
        "not (Metadata_n == 1 or Metadata_n == 2) and Metadata_flag == True",
        "Metadata_n in [1, 2,]",
        "Metadata_Compound == Metadata_Plate",
        "Metadata_Compound.str.match('D|tax')",
        "Metadata_Compound.str.contains('(?i)MS|O')",
        r"Metadata_Compound.str.contains(r'\w \w')",
        "Metadata_Compound.str.startswith('t') or Metadata_n == 2",
        "~Metadata_Compound.str.endswith('b')",
        "Metadata_Concentration.isna()",
        "Metadata_Concentration.notna() and Metadata_n != 3",
    ],
)
def test_rows_are_those_of_pandas(query):
    expected = np.zeros(len(TABLE), bool)
    expected[TABLE.reset_index(drop=True).query(query, engine="python").index] = True
    assert list(select_rows(query, TABLE)) == list(expected)


def test_comparisons_with_missing_values_are_false():
    assert list(select_rows("Metadata_Concentration != 3", TABLE)) == [False, True, True, False, True]
    assert list(select_rows("`Metadata_pert type` not in ['neg']", TABLE)) == [False, False, True, True, False]
    assert not select_rows("Metadata_Compound == None", TABLE).any()


def test_short_names():
    assert list(find_controls(TABLE, "compound == 'x' and concentration < 1")[0]) == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("Metadata_Compound.__class__.__init__.__globals__['sys'].modules['os'].system('touch HERE')", "'.__class__' is refused"),
        ("Metadata_Compound.to_csv('HERE')", "'.to_csv' is refused"),
        ("Metadata_Compound.str.len() > 2", r"'\.str\.len' is refused"),
        ("9**9**9", r"'\*\*' is not understood"),
        ("Metadata_n == 9**9**9", r"'\*\*' is not understood"),
        ("Metadata_n + 1 > 2", r"'\+' is not understood"),
        ("@np.x == 1", "no variables"),
        ("Metadata_Compound = 'x'", "compared by =="),
        ("abs(Metadata_n) > 1", "no functions"),
        ("Metadata_Compound[0] == 'x'", r"'\[' is not understood"),
        ("[x for x in y]", "no column 'x'"),
        ("Metadata_n in [Metadata_n]", "constants"),
        ("lambda: 1", "'lambda'"),
        ("Metadata_Compound", "alone is no condition"),
        ("1 == 1", "compares no column"),
        ("'abc", "not a query"),
        ("", "not a query"),
        ("Metadata_compund == 'x'", "no column 'Metadata_compund'; there are Metadata_Compound"),
        ("Metadata_Compound == 3", "holds text, 3 is numbers; in quotes it is text: '3'"),
        ("Metadata_n == '3'", "holds numbers, '3' is text; numbers have no quotes"),
        ("Metadata_n.str.match('3')", "holds numbers; .str.match is for text"),
        ("Metadata_flag == 1", "holds True and False"),
        ("Metadata_Compound.str.match('(')", "not a regular expression"),
        ("Metadata_Compound.str.match('(?!x)')", "bounded cost"),
        ("Metadata_Compound.str.match('x', case=False)", "not in the language"),
        (f"Metadata_Compound.str.match('{'a' * 301}')", "at most 300"),
        ("(" * 1000, "deep"),
        ("[" * 1000, "constants only"),
        ("~" * 1000 + "Metadata_flag", "more than 50"),
        ("x" * 5000, "at most 4000"),
    ],
)
def test_everything_else_is_refused_by_name(query, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CellfastError, match="not a query over the metadata") as caught:
        find_controls(TABLE, query)
    with pytest.raises(CellfastError, match=message):
        raise caught.value
    assert not list(tmp_path.iterdir())


def test_regular_expressions_that_backtrack_for_ever_do_not():
    table = pd.DataFrame({"Metadata_Compound": ["a" * 5000 + "b"]})
    assert not select_rows("Metadata_Compound.str.match('(a+)+$')", table).any()
    assert not select_rows("Metadata_Compound.str.contains('(a|aa)*c')", table).any()

"""What the benchmarks report: the comparison's Markdown, quality seed by seed, the figures of README, and the command's options."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cellfast.benchmark import SUBJECTS
from cellfast.benchmark.reference.baseline import plain_accuracies
from cellfast.benchmark.reference.cells import simulated_features, simulated_treatments
from cellfast.benchmark.reference.measure import ratios, summary
from cellfast.benchmark.reference.ours import Implementation as Ours
from cellfast.benchmark.reference.quality import paired_differences, score_features
from cellfast.benchmark.reference.report import document as written
from cellfast.benchmark.reference.report import markdown
from cellfast.benchmark.reference.scaling import line_through
from cellfast.benchmark.reference.table import Settings
from cellfast.cli import cellfast
from cellfast.cli.benchmark import OPTIONS
from cellfast.errors import CellfastError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from figures import BEGIN, END, main, read_results, with_block  # noqa: E402


def runs(differences, sides=("cellfast", "reference"), steps=40):
    """Runs of two sides whose NSC, of 10 treatments, differs by ``differences`` seed by seed."""
    made = []
    for seed, more in enumerate(differences):
        for side, correct in zip(sides, (5 + seed % 3 + more, 5 + seed % 3)):
            for limit, k in (("random weights", 1), ("same steps", correct), ("same time", 10)):
                score = {"accuracy": k / 10, "num_correct": k, "num_evaluated": 10}
                made.append({"side": side, "limit": limit, "seed": seed, "steps": steps, "seconds": 1.0, "nsc": score, "nscb": score,
                             "retrieval": None, "retrieval_chance": None})  # fmt: skip
    return {"steps": steps, "batch_size": 128, "size": 56, "encoder": "resnet18", "cells": 1000, "origin": "o",
            "seeds": list(range(len(differences))), "runs": made}  # fmt: skip


def test_quality_is_compared_seed_by_seed_with_a_t_interval():
    """Differences 2, 0, 1, 3, -1 of 10: mean 0.1, s = sqrt(2.5) / 10 = 0.1581, half = 2.7764 · s / sqrt(5) = 0.1963."""
    nsc, nscb = paired_differences(runs([2, 0, 1, 3, -1]), "reference")
    assert (nsc["side"], nsc["measure"], nscb["measure"], nsc["seeds"]) == ("cellfast", "nsc", "nscb", 5)
    assert nsc["mean"] == pytest.approx(0.1)
    assert nsc["interval_95"] == pytest.approx([-0.0963, 0.2963], abs=1e-4)
    text = markdown(document(quality=runs([2, 0, 1, 3, -1], sides=("cellfast", "baseline"))))
    assert "from 5 seeds" in text
    assert "5,120 images" in text
    assert "| cellfast | +10.0 (-9.6 to +29.6) | +10.0 (-9.6 to +29.6) |  |" in text


def test_with_fewer_than_five_seeds_nothing_is_claimed():
    few = runs([3, 3, 3, 3], sides=("cellfast", "baseline"))
    assert paired_differences(few, "baseline") == []
    text = markdown(document(quality=few))
    assert "Fewer than 5 seeds: nothing is said about which side's features are better." in text
    assert "percentage points" not in text
    assert "same time" not in text
    assert "| cellfast | trained | 8/10, 9/10, 10/10, 8/10 |" in text


def test_measures_of_the_published_comparison_can_be_reported():
    text = markdown(json.loads((ROOT / "benchmarks" / "results" / "reference.json").read_text(encoding="utf-8")))
    assert "| 100,000 | ~4.26 s (~2.7 GiB) |" in text
    assert "| 1,024 | 0.0488 s (21 MiB) | out of memory at 15.5 GiB |" in text
    assert "2 seeds" in text
    assert "nothing is said about which side's features are better" in text


def test_evaluations_of_treatments_agree():
    profiles, metadata = simulated_treatments(64)
    assert len(profiles) == len(metadata) == 103
    theirs = plain_accuracies(profiles, *(metadata[name].to_numpy() for name in ("compound", "moa", "batch")))
    assert Ours({}).evaluate(profiles, metadata)() == pytest.approx(theirs, abs=1e-12)
    assert 0 < min(theirs) < max(theirs) < 1


def test_features_of_both_sides_are_scored_alike():
    features, metadata = simulated_features(1200, 16)
    found = score_features(features, metadata)
    treated = metadata[metadata["compound"] != "DMSO"]
    assert found["nsc"]["num_evaluated"] == treated.groupby(["compound", "concentration"]).ngroups
    assert 0 < found["retrieval_queries"] <= len(treated)  # controls are no queries
    json.dumps(found, allow_nan=False)


def test_two_control_wells_are_enough_to_be_scored():
    """Fewer control wells than features by far: the regularisation is given, not estimated from them."""
    features, metadata = simulated_features(400, 300)
    control = metadata["compound"] == "DMSO"
    first = metadata[control].drop_duplicates(["Metadata_Plate", "Metadata_Well"]).index[:2]
    wells = metadata["Metadata_Plate"] + metadata["Metadata_Well"]
    kept = (~control & metadata["Metadata_Plate"].isin(metadata["Metadata_Plate"][first])) | wells.isin(wells[first])
    found = score_features(features[kept], metadata[kept].reset_index(drop=True))
    assert found["nsc"]["num_evaluated"] > 0


def test_a_straight_line_extrapolates_and_never_falls():
    assert line_through([(1000, 2.0), (10_000, 11.0)], 100_000) == pytest.approx(101.0)
    assert line_through([(1000, 2.0)], 10_000) == pytest.approx(20.0)
    assert line_through([(1000, 2.0), (10_000, 1.0)], 100_000) == 1.0


def side(seconds, cells=100, peak=3e9):
    return summary({"seconds": seconds, "cells": cells, "peak_bytes": peak, "imported_bytes": 1e9, "versions": {}})


def document(**sections):
    system = {"cpu": {"name": "a CPU", "cores": 2}, "memory_bytes": 2**34, "cellfast": "0", "packages": {"torch": "2"}, "gpus": [], "python": "3",
              "bfloat16_native": False}  # fmt: skip
    result = {"subject": "reference", "other": {"name": "baseline", "commit": ""}, "settings": Settings().__dict__, **sections}
    return {"subject": "reference", "quick": False, "environment": {"system": system, "commit": "abc"}, "result": result}


def test_ratios_are_per_cell_and_what_stands_in_is_named():
    ours, theirs = side([1.0, 2.0, 3.0], cells=100), side([8.0], cells=200, peak=5e9)
    assert (ours["median_seconds"], ours["spread"], ours["cells_per_second"]) == (2.0, 1.0, 50.0)
    assert ratios(ours, theirs) == pytest.approx({"times_faster": 2.0, "memory_ratio": 0.6, "growth_ratio": 0.5})
    entry = {"what": "x", "cellfast": {**ours, **ratios(ours, theirs)}, "baseline": theirs}
    text = markdown(document(cells={"number": 5, "size": 96, "origin": "o"}, parts={"step": entry}))
    assert "no checkout of the reference was given" in text
    assert "| step | cellfast | 2.0 | 0.60 | 0.50 |" in text


def test_an_earlier_file_s_other_sections_are_kept_and_other_settings_refused(tmp_path):
    other = {"name": "baseline", "commit": ""}
    before = document(agreement={"steps": 3}, parts={"load": {"what": "x"}})
    (tmp_path / "r.json").write_text(json.dumps(before))
    now = {"subject": "reference", "other": other, "settings": Settings().__dict__, "parts": {"step": {"what": "y"}}}
    merged = written(now, quick=False, earlier=tmp_path / "r.json")["result"]
    assert list(merged["parts"]) == ["load", "step"]
    assert (merged["parts"]["load"]["commit"], merged["agreement"]["commit"]) == ("abc", "abc")
    assert merged["parts"]["step"]["commit"] != "abc"
    with pytest.raises(CellfastError, match="settings"):
        written({**now, "settings": Settings(threads=1).__dict__}, quick=False, earlier=tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"result": 3}')
    with pytest.raises(CellfastError, match="not a result of this benchmark"):
        written(now, quick=False, earlier=tmp_path / "r.json")


def test_running_out_of_memory_and_extrapolation_are_said():
    rows = [{"minibatch": 64, "median_seconds": 1.0, "growth_bytes": 2**20, "allowed_bytes": 2**30}]
    stops = [*rows, {"minibatch": 128, "out_of_memory": "no", "allowed_bytes": 2**30}]
    by_cells = [{"cells": 10, "seconds": 1.0, "growth_bytes": 1.0, "extrapolated": False},
                {"cells": 1000, "seconds": 100.0, "growth_bytes": 100.0, "extrapolated": True}]  # fmt: skip
    cores = [{"threads": 1, "seconds": 1.0, "cells_per_second": 5.0}]
    text = markdown(document(scaling={
        "cells": {"load": {"cellfast": by_cells}}, "minibatch": {"loss": {"cellfast": rows, "baseline": stops}},
        "cores": {"step": {"cellfast": cores}},
    }))  # fmt: skip
    assert "| 1,000 | ~100 s (~0 MiB) |" in text
    assert "| 10 | 1 s (0 MiB) |" in text
    assert "out of memory at 1.0 GiB" in text


# Figures


def test_what_the_repository_says_agrees_with_the_results():
    assert main(["--check"]) == 0, "run `make figures`"


def test_results_that_change_change_the_figures(tmp_path, capsys):
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", results)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--check"], tmp_path) == 1
    assert "README.md does not agree" in capsys.readouterr().err
    assert main([], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
    block = readme.read_text().partition(BEGIN)[2].partition(END)[0]
    assert readme.read_text() == f"before\n{BEGIN}{block}{END}\nafter\n"
    assert block.count("`cellfast benchmark ") == 6
    one = json.loads((results / "train.json").read_text())
    one["result"]["cells_per_second"]["full"], one["environment"]["commit"] = 1234.0, "c0ffee" * 7 + "-dirty"
    one["environment"]["system"]["cpu"]["name"] = "another CPU"
    (results / "train.json").write_text(json.dumps(one))
    assert main(["--check"], tmp_path) == 1
    assert main([], tmp_path) == 0
    section = (results / "README.md").read_text().partition("## `cellfast benchmark train`")[2].partition("## ")[0]
    assert "another CPU" in section
    assert "commit c0ffeec0ffee-dirty." in section
    assert "| 1,234 |" in section


def test_figures_of_a_quick_run_and_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(CellfastError, match="no results"):
        read_results(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps({**document(), "quick": True}))
    with pytest.raises(CellfastError, match="--quick"):
        read_results(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps({**document(), "subject": "colour"}))
    with pytest.raises(CellfastError, match="no figures are known for 'colour'"):
        read_results(tmp_path)
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(CellfastError, match="expected a result of cellfast benchmark"):
        read_results(tmp_path)
    with pytest.raises(CellfastError, match="once each"):
        with_block("no marks", "block")
    assert main(["--chekc"]) == 2


# The command


def test_benchmark_lists_what_can_be_measured():
    run = CliRunner().invoke(cellfast, ["benchmark"])
    assert run.exit_code == 0
    assert {"ntxent", "loader", "augment", "train", "evaluate", "reference"} <= set(SUBJECTS)
    assert all(name in run.output for name in SUBJECTS)


def test_every_option_of_a_subject_is_an_argument_of_its_function():
    for subject in SUBJECTS.values():
        if subject.command is None:
            module, function = subject.function.split(":")
            arguments = inspect.signature(getattr(importlib.import_module(module), function)).parameters
            assert {*subject.options, *subject.full, *subject.quick} <= set(arguments)
            assert set(subject.options) <= set(OPTIONS)
    run = CliRunner().invoke(cellfast, ["benchmark", "ntxent", "--sizes", "64by8"])
    assert run.exit_code == 2
    assert "expected MxD,MxD" in run.output

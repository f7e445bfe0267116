"""The GPU benchmark's driver: what fails is recorded and the rest goes on, in several calls where one is too short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import Bench, in_order, unusable_packages, wheels_to_install  # noqa: E402
from gpu_table import failures, table  # noqa: E402


def make(tmp_path: Path, **options) -> Bench:
    return Bench(tmp_path / "out", "cpu", 60, state=tmp_path / "state", **options)


def say(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_failing_step_is_recorded_and_the_others_go_on(tmp_path):
    bench = make(tmp_path)
    bench.step("bad", lambda: {"said": bench.command("bad", say("raise SystemExit('no such luck')"))})
    bench.step("slow", lambda: {"said": bench.command("slow", say("import time; time.sleep(60)"), limit_s=0.5)})
    bench.step("good", lambda: {"said": bench.command("good", say("print('fine')"))})
    steps = json.loads((tmp_path / "out" / "summary.json").read_text())["steps"]
    assert [steps[name]["ok"] for name in ("bad", "slow", "good")] == [False, False, True]
    assert "no such luck" in steps["bad"]["error"]
    assert "no end after" in steps["slow"]["error"]
    assert steps["good"]["said"] == "fine\n"
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "===== bad\nno such luck" in log
    assert "===== good\nfine" in log


def test_a_step_that_is_killed_takes_its_children_with_it(tmp_path):
    bench = make(tmp_path)
    child = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); time.sleep(60)"
    with pytest.raises(RuntimeError, match="no end after"):
        bench.command("parent", say(child), limit_s=2)
    pid = int((tmp_path / "state" / "parent.log").read_text())
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child runs on")


def test_a_budget_ends_the_call_and_the_next_one_resumes(tmp_path):
    """Only what was not begun, or was cut short, is run again, the latter last; what a stopped measurement had is kept."""
    ran = []

    def note(name):
        ran.append(name)
        return {}

    half = "import json, time; open({!r}, 'w').write(json.dumps({{'constant': {{'cells_per_second': 5}}}})); time.sleep(60)"
    first = make(tmp_path, budget_s=17.0)
    first.step("quick", lambda: note("quick"))
    first.step("broken", lambda: {}["no such key"])
    first.step("step-long", lambda: {"said": first.command("step-long", say(half.format(str(first.state / "step-long.json"))))})
    first.step("later", lambda: note("later"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    steps = summary["steps"]
    assert ran == ["quick"]
    assert "when the budget of this call ended" in steps["step-long"]["error"]
    assert steps["later"]["error"] == "not begun: the budget of this call is used up"
    assert json.loads((tmp_path / "out" / "measurements.json").read_text())["step-long"]["constant"]["cells_per_second"] == 5
    assert summary["table"][0].split() == ["step-long", "constant", "5", "cells/s"]

    assert in_order(["build", "step-long", "later"], ["build", "step-long"]) == ["build", "later", "step-long"]
    second = make(tmp_path, resume=True)
    assert "later" not in second.summary["steps"]
    assert "step-long" in second.summary["steps"]
    for name in ("quick", "broken", "step-long", "later"):
        second.step(name, lambda name=name: note(name))
    assert ran == ["quick", "step-long", "later"]
    assert [second.summary["steps"][name]["ok"] for name in ("quick", "broken", "step-long", "later")] == [
        True,
        False,
        True,
        True,
    ]


def test_other_sources_are_not_resumed(tmp_path, monkeypatch):
    first = make(tmp_path)
    first.step("quick", dict)
    monkeypatch.setattr("gpu.source_digest", lambda: "another")
    assert make(tmp_path, resume=True).summary["steps"] == {}


def test_what_was_measured_half_way_does_not_stop_the_table():
    assert "incomplete" in table({"step-x": {"constant": {}}, "decode": {"rows": [{}]}})[0]
    assert table({"ntxent-sm90a": {"sm90a bfloat16 8x8": {"peers": {"cellfast": {"failed": "no luck"}}}}})[0].endswith("no luck")


def test_a_part_of_a_measurement_that_failed_is_told():
    found = {"constant": {"cells_per_second": 1.0}, "resident": {"failed": "no memory"}, "rows": [{}, {"failed": "no decoder"}]}
    assert failures(found) == ["resident: no memory", "rows/1: no decoder"]


def test_packages_that_cannot_be_imported_are_told(monkeypatch, tmp_path):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('made for another version')")
    monkeypatch.setattr("gpu.PACKAGES", {"no_such_module": "no-such", "broken_module": "broken-thing", "json": "json"})
    found = unusable_packages(sys.executable, {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert found == {
        "no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
        "broken_module": "RuntimeError: made for another version",
    }
    for name in ("broken_thing-1.0-py3-none-any.whl", "new_one-1.0-py3-none-any.whl", "pytest-8.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert [wheel.name.split("-")[0] for wheel in wheels_to_install(tmp_path, found)] == ["broken_thing", "new_one"]


def test_wheels_are_installed_without_a_network(tmp_path, monkeypatch):
    wheel = tmp_path / "cellfast_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("cellfast_probe.py", "answer = 42\n")
        archive.writestr("cellfast_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: cellfast-probe\nVersion: 1.0\n")
        archive.writestr("cellfast_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("cellfast_probe-1.0.dist-info/RECORD", "")
    monkeypatch.setattr("gpu.SITE", tmp_path / "site")
    monkeypatch.setattr("gpu.PACKAGES", {"cellfast_probe": "cellfast-probe"})
    bench = make(tmp_path)
    assert bench.install(None)["unusable"] == {"cellfast_probe": "ModuleNotFoundError: No module named 'cellfast_probe'"}
    assert bench.install(tmp_path) == {"installed": [wheel.name], "failed": [], "unusable": {}}
    assert bench.command("probe", say("import cellfast_probe; print(cellfast_probe.answer)")) == "42\n"


@pytest.mark.slow
def test_a_dry_run_on_the_cpu_measures_everything(tmp_path):
    steps = "environment,install,augment,step-resnet18,step-resnet18-chunked,step-resnet18-graphs,embed-resnet50,decode,ntxent-portable"
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path), "--only", steps]
    environment = {**os.environ, "CELLFAST_BENCH_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    summary = json.loads((tmp_path / "summary.json").read_text())
    failed = [name for name, entry in summary["steps"].items() if not entry["ok"]]
    # CUDA graphs need a GPU: this step shows that a failure is told.
    assert failed == ["step-resnet18-graphs"], done.stdout + done.stderr
    assert "--cuda-graphs cannot be used: they need a GPU" in summary["steps"]["step-resnet18-graphs"]["error"]
    assert done.returncode == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "measurements.json", "summary.json"]
    found = json.loads((tmp_path / "measurements.json").read_text())
    assert found["step-resnet18"]["resident"]["fraction"] > 0
    assert found["step-resnet18"]["stream"]["cells_per_second"] > 0
    assert found["step-resnet18"]["augment_share"] > 0
    assert found["embed-resnet50"]["fraction"] > 0
    assert found["ntxent-portable"]["cpu float32 512x128"]["peers"]["cellfast"]["forward_backward"]["median_ms"] > 0
    rows = found["decode"]["rows"]
    assert {row["compression"] for row in rows} == {"none", "lzw", "zlib"}
    assert {row["compression"] for row in rows if "failed" in row} == {"zlib"}  # which DALI is not given
    assert all(row["decode_fields_per_second"] > 0 and row["decode"] in ("host", "cpu") for row in rows if "failed" not in row)

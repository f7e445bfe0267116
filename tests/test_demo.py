"""The demonstration, on a tiny screen: its commands run, what is done is not done again, and what fails is named."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from screens import run

from cellfast import demo
from cellfast.cli import cellfast
from cellfast.errors import CellfastError

TINY = {
    "simulation": "--preset demo --plates 4 --weeks 2 --moas 2 --compounds-per-moa 2 --doses 1 --sites 1 --controls 2 --workers 1".split(),
    "training": "--encoder cnn4 --batch-size 32 --steps 2 --validation none --threads 1".split(),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demonstration that was run to its end, and what it said."""
    out = tmp_path_factory.mktemp("demo") / "out"
    said = []
    demo.run_demo(out, seed=0, fresh=False, echo=said.append, execute=here, **TINY)
    return out, "\n".join(said)


def here(arguments):
    # Without the processes of an ingest, each of which imports everything anew.
    result = run(*arguments, *(("--workers", 1) if arguments[0] == "ingest" else ()))
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    return 0


def again(out, execute, **options):
    said = []
    demo.run_demo(out, echo=said.append, execute=execute, **{"seed": 0, "fresh": False, **TINY, **options})
    return "\n".join(said)


def test_every_step_is_shown_as_its_command_and_the_table_holds_the_results(finished):
    out, said = finished
    assert [line.split()[2] for line in said.splitlines() if line.startswith("$ cellfast ")] == [
        *("simulate", "ingest"),
        *("train", "embed", "profile", "evaluate") * 2,
    ]
    for name in ("trained", "random"):
        result = json.loads((out / name / "result.json").read_text())["nsc"]
        row = next(line for line in said.splitlines() if line.startswith(f"{name} "))
        assert f"({result['num_correct']:.6g}/{result['num_evaluated']})" in row
        assert result["num_evaluated"] > 0
    for line in said.splitlines():
        if line.startswith(("picture ", "numbers ", "profiles ")):
            assert (out.parent / line.split(maxsplit=1)[1]).is_file()
    assert said.count("picture ") > 0


def test_what_is_done_is_not_done_again(finished):
    out, _ = finished
    assert again(out, lambda arguments: pytest.fail(f"done again: {arguments}")).count("already done") == 10


def test_a_step_whose_result_is_gone_and_all_after_it_are_done_again(finished, tmp_path):
    out, _ = finished
    steps = demo.demo_steps(out, seed=0, amp=False, **TINY)
    kept, done = steps[8].result.read_bytes(), []
    steps[8].result.unlink()
    again(out, lambda arguments: done.append(arguments[0]) or steps[8].result.write_bytes(kept) * 0)
    assert done == ["profile", "evaluate"]


def test_a_step_that_fails_is_named_and_the_next_run_goes_on_with_it(tmp_path):
    called = []

    def fails_at_the_second(arguments):
        called.append(arguments[0])
        (tmp_path / "simulated").mkdir(exist_ok=True)
        (tmp_path / "simulated" / "image.csv").touch()
        return int(len(called) > 1)

    for _ in range(2):
        with pytest.raises(CellfastError, match=r"stopped at step 2: `cellfast ingest fields .*status 1"):
            again(tmp_path, fails_at_the_second)
    assert called == ["simulate", "ingest", "ingest"]
    with pytest.raises(CellfastError, match=r"stopped at step 1: `cellfast simulate .* --seed 3"):
        again(tmp_path, lambda arguments: 2, seed=3)
    with pytest.raises(CellfastError, match="stopped at step 1"):
        again(tmp_path, lambda arguments: 2, fresh=True)


def test_the_command_runs_it_with_the_demonstrations_own_settings(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(demo.subprocess, "run", lambda command, env: asked.append(command) or type("Done", (), {"returncode": 7}))
    result = CliRunner().invoke(cellfast, ["demo", str(tmp_path / "d")])
    assert "stopped at step 1" in str(result.exception)
    assert asked[0][1:] == [
        "-m",
        "cellfast",
        "simulate",
        str(tmp_path / "d" / "simulated"),
        "--preset",
        "demo",
        "--seed",
        "0",
        "--force",
    ]
    steps = demo.demo_steps(tmp_path, seed=0, amp=True)
    assert [step.arguments[2:4] for step in steps if step.arguments[0] == "train"] == [("--recipe", "demo")] * 2
    assert ["--amp" in step.arguments for step in steps if step.arguments[0] == "train"] == [True, False]

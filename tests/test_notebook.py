"""The notebook of examples/: its steps are those of the README, and it runs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "plate_to_moa.ipynb"


def calls(code: str) -> list[str]:
    """The functions of cellfast that some code calls, in order."""
    found = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    named = [f for f in found if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == "cellfast"]
    return [f.attr for f in sorted(named, key=lambda f: f.lineno)]


def test_the_notebook_takes_the_steps_of_the_readme():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    ours = calls("\n".join("".join(cell["source"]) for cell in code))
    block = next(
        b
        for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        if "cellfast." in b
    )
    assert len(block.splitlines()) <= 10
    assert ours == ["simulate", *calls(block)]
    assert calls(block) == ["ingest_fields", "train", "embed", "profile", "evaluate"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install cellfast[test]")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install cellfast[test]")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("NSC" in output.get("data", {}).get("text/html", "") for output in shown)
    assert any("image/png" in output.get("data", {}) for output in shown)

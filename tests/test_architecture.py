"""docs/architecture.md lists every file of the code with its own first sentence. `python tests/test_architecture.py` writes the list."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files: written by `python tests/test_architecture.py` -->", "<!-- end of files -->"
MOST_LINES = 460


def sentence(file: Path) -> str:
    """The first paragraph that a file says of itself."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        told = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = []
        for line in text.splitlines():
            if not line.startswith("//"):
                break
            lines.append(line.removeprefix("//").strip())
        told = "\n".join(lines)
    return re.sub(r"\s+", " ", told.split("\n\n")[0]).strip().replace("|", r"\|")


def sources() -> list[Path]:
    found = [p for p in (ROOT / "cellfast").rglob("*.py") if p.name not in ("__main__.py",)]
    found += [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh", ".py")]
    return sorted((p for p in found if p.read_text(encoding="utf-8").strip()), key=lambda p: (p.parent.as_posix(), p.name))


def listing() -> str:
    lines, folder = [BEGIN], None
    for file in sources():
        if file.parent != folder:
            folder = file.parent
            lines += ["", f"`{folder.relative_to(ROOT)}/`", ""]
        lines.append(f"- `{file.name}` {sentence(file)}")
    return "\n".join([*lines, "", END])


def test_every_file_says_what_it_is():
    silent = [str(file.relative_to(ROOT)) for file in sources() if not sentence(file)]
    assert not silent


def test_the_page_lists_the_files_that_are_there():
    page = PAGE.read_text(encoding="utf-8")
    assert page[page.index(BEGIN) : page.index(END) + len(END)] == listing(), "run: python tests/test_architecture.py"


def test_files_can_be_held_in_the_head():
    long = {
        str(file.relative_to(ROOT)): count
        for file in sources()
        if file.suffix == ".py" and (count := len(file.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(BEGIN)] + listing() + text[text.index(END) + len(END) :], encoding="utf-8")

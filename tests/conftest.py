"""Shared fixtures: where the real data is, which devices can be tested, and why something was skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Several pytest workers share the processors: threads that spin while they wait would take them from each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def real_data_folder() -> Path | None:
    """The real data folder, or None: ``$CELLFAST_TEST_DATA``, else ``../shared/data`` beside the checkout."""
    for candidate in (os.environ.get("CELLFAST_TEST_DATA"), ROOT.parent / "shared" / "data"):
        if candidate and (Path(candidate) / "bbbc021").is_dir():
            return Path(candidate)
    return None


def cuda_unavailable() -> str | None:
    """Why CUDA tests cannot run here, or None when they can."""
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA GPU: torch.cuda.is_available() is False"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    data = real_data_folder()
    # CELLFAST_REQUIRE_CUDA=1 (make test-gpu) turns the CUDA skip into a failure: a GPU run that skips its tests has tested nothing.
    reason = None
    if any("cuda" in item.keywords for item in items) and os.environ.get("CELLFAST_REQUIRE_CUDA") != "1":
        reason = cuda_unavailable()
    for item in items:
        if "data" in item.keywords and data is None:
            item.add_marker(
                pytest.mark.skip(reason="needs the real data: set CELLFAST_TEST_DATA to a folder with bbbc021/ in it")
            )
        if "cuda" in item.keywords and reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The crop store of `screens.make_screen`; not to be written to."""
    from screens import make_screen

    return make_screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fields, a model, their crop store, and the embeddings of a run that nothing disturbed; not to be written to."""
    from screens import embed, field_arguments, make_fields, make_model, run

    folder = tmp_path_factory.mktemp("clean")
    make_fields(folder, sites=3)
    make_model(folder / "model.pt")
    ingested = run("ingest", "fields", *field_arguments(folder), "--crop-size", 24, "--workers", 1, "-o", folder / "store")
    assert ingested.exit_code == 0, ingested.output
    embed("fields", folder, folder / "clean")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real data folder; use together with ``@pytest.mark.data``."""
    folder = real_data_folder()
    assert folder is not None
    return folder

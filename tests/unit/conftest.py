"""Fixtures that several files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chromium import Page, chromium_page
from tests.support.folder import WorkingFolder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkingFolder:
    """A working folder of the demo, in which the test runs."""
    made = WorkingFolder.create(tmp_path / "clone")
    monkeypatch.chdir(made.path)
    return made


@pytest.fixture(scope="module")
def package(tiny: Path) -> Path:
    """A package of a model that answers at once, with random weights."""
    return tiny / "model"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium_page() as page:
        yield page

"""A working folder with the workflow and the demo's config, for tests that change one thing in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.folder import WorkingFolder


@pytest.fixture
def folder(tmp_path: Path) -> WorkingFolder:
    return WorkingFolder.create(tmp_path / "competition")

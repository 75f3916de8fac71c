"""Fixtures that several files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from palio import cpu
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


@pytest.fixture
def bf16_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel tells of a CPU that multiplies in bfloat16. One that does not only takes longer."""
    path = tmp_path / "cpuinfo"
    path.write_text("flags : fpu avx512f avx512_bf16\n")
    monkeypatch.setattr(cpu, "CPU_INFO", path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium_page() as page:
        yield page

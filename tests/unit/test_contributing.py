"""What CONTRIBUTING.md shows works: an operation in a package of its own, and every diff."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.curation import write_jsonl
from tests.support.plugin import install

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
ROWS = [
    {"prompt": "Where is the race?", "completion": "In Siena."},
    {"prompt": "Who won?", "completion": "See https://example.org/palio"},
]


def blocks(language: str) -> list[str]:
    """The page's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def curate(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Curate two rows with `op: drop_links` in an interpreter that sees the package."""
    source = write_jsonl(folder / "rows.jsonl", ROWS)
    recipe = {"sources": [{"path": str(source), "licence": "MIT"}], "operations": [{"op": "drop_links"}]}
    entry = {"team": "Civetta", "track": "laptop", "base_model": {"path": "none"}, "finetune": {}}
    (folder / "civetta.yaml").write_text(json.dumps(entry | {"dataset": recipe}))
    arguments = ["curate", "civetta.yaml", "--out", "civetta/dataset"]
    return subprocess.run(
        [sys.executable, "-m", "palio.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_installed_package_adds_the_operation_of_the_page(tmp_path: Path) -> None:
    (code,) = blocks("python")
    install(tmp_path / "site", blocks("toml")[0], drop_links=code)
    done = curate(tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    (dropped,) = pq.read_table(tmp_path / "civetta/dataset/dropped.parquet").to_pylist()
    assert (dropped["prompt"], dropped["reason"]) == ("Who won?", "contains links (1)")
    manifest = json.loads((tmp_path / "civetta/dataset/manifest.json").read_text())
    assert manifest["operations"][0]["settings"] == {"most": 0}


def test_without_the_package_the_operation_is_unknown(tmp_path: Path) -> None:
    done = curate(tmp_path, tmp_path)
    assert done.returncode == 2
    assert "dataset.operations.0: unknown operation; use one of cap_rows, clean_markup" in done.stderr


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("import nowhere", "cannot be imported: No module named 'nowhere'; fix or remove its package"),
        ("DropLinks = 1", "drop_links:DropLinks does not define it; fix or remove its package"),
    ],
)
def test_a_broken_package_is_named_in_one_line(tmp_path: Path, code: str, line: str) -> None:
    install(tmp_path / "site", blocks("toml")[0], drop_links=code)
    done = curate(tmp_path, tmp_path / "site")
    assert done.returncode == 2
    assert line in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("diff", blocks("diff"))
def test_every_diff_of_the_page_applies(diff: str) -> None:
    command = ["git", "apply", "--check", "-"]
    done = subprocess.run(command, cwd=ROOT, input=diff, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_a_diff_for_each_part() -> None:
    assert len(blocks("diff")) == PAGE.count("\n## A ")

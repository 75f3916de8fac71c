"""`site`: the workflow publishes whenever an entry has finished, and at the end the final leaderboard."""

from __future__ import annotations

import subprocess
from pathlib import Path

from palio.files import read_json_lines
from tests.support.folder import DEMO_ENTRIES, WorkingFolder
from tests.support.quick import PUBLISHED, program

STANDINGS = ["publish-site", "public", "--leaderboards", "results/standings"]
FINAL = ["publish-site", "public"]


def run(folder: WorkingFolder, environment: dict[str, str], **variables: str) -> list[list[str]]:
    """Start the workflow; return what has been published in all, and how."""
    command = ["snakemake", "--profile", "local", "--cores", "4"]
    subprocess.run(
        command, cwd=folder.path, env=environment | variables, capture_output=True, timeout=900, check=False
    )
    return [
        line["words"] for line in read_json_lines(folder.path / PUBLISHED) if line["words"] != ["standings"]
    ]


def test_it_is_published_after_every_entry_and_at_the_end(folder: WorkingFolder, tmp_path: Path) -> None:
    environment = program(tmp_path / "bin")
    for entry in ("curated", "open_only"):
        (folder.path / DEMO_ENTRIES / f"{entry}.yaml").unlink()
    folder.edit_yaml("config/config.yaml", lambda config: config.update(site="public"))
    failed = run(folder, environment, PALIO_FAULTY="raw closed")
    assert failed == [STANDINGS], "after untuned, not after the one that failed"
    assert run(folder, environment) == [*failed, STANDINGS, FINAL]
    assert run(folder, environment) == [*failed, STANDINGS, FINAL], "nothing is new"

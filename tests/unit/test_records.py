"""Records and sidecars on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from palio.errors import BadInput
from palio.records import CurateRun, RunFacts, read_record, timed_run


def test_a_failed_step_leaves_its_sidecar_with_what_it_knew(tmp_path: Path) -> None:
    path = tmp_path / "curate.run.json"
    with pytest.raises(ZeroDivisionError), timed_run(path, CurateRun()) as run:
        run.shards = 3
        1 / 0  # noqa: B018
    left = read_record(CurateRun, path)
    assert left.shards == 3
    assert left.host
    assert left.seconds is not None


def test_a_sidecar_refuses_what_is_not_one_of_its_facts(tmp_path: Path) -> None:
    path = tmp_path / "package.run.json"
    path.write_text('{"second": 1}')
    with pytest.raises(BadInput, match=r"package\.run\.json: second"):
        read_record(RunFacts, path)
    with pytest.raises(ValueError, match="seconds"):
        RunFacts().seconds = "long"  # type: ignore[assignment]

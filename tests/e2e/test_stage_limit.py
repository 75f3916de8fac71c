"""A stage limit of a minute on real tasks that need four: what is answered stands, the rest can follow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from palio.errors import State
from palio.evaluation.evaluate import evaluate
from palio.layout import EntryFolder
from palio.records import StageRecord
from palio.scoring.columns import columns_of, stage_cells
from palio.serving.process import ServerProcess
from palio.settings import EvaluateSettings, StageLimits
from tests.support.entry import UNPROBED, packaged_entry
from tests.support.serving import metric, one_core
from tests.support.stages import competition_of_2023, needs_data, real_stage

pytestmark = [needs_data, pytest.mark.timeout(2400)]
MINUTE = 60


def test_a_minute_keeps_what_it_answered_and_a_lifted_limit_asks_only_the_rest(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    competition = competition_of_2023(tmp_path, scale=0.03)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PALIO_HELM_DATA", raising=False)
    runs = real_stage(competition, "open", tmp_path)
    entry_dir = packaged_entry(tmp_path)
    (entry_dir / "package").symlink_to(base_model)
    folder = EntryFolder.at(entry_dir)
    served: list[int] = []

    @contextmanager
    def counted(log: Path) -> Iterator[ServerProcess]:
        with one_core(folder.package)(log) as server:
            yield server
            served.append(int(metric(server, "requests_total")))

    def ask(seconds: float) -> tuple[StageRecord, float, int]:
        """The stage's record, the seconds it used in all, and the answers it has."""
        limits = StageLimits(time_limit=seconds, threads=4, unanswered="wrong")
        settings = EvaluateSettings(
            competition_id=runs.competition,
            runs=runs,
            limits=limits,
            track=competition.tracks["a100"],
            probe=UNPROBED,
        )
        record = evaluate(folder, settings, tmp_path / "open.json", counted, folder.package)
        used = json.loads((entry_dir / "open.run.json").read_text())["used_seconds"]
        (journal,) = entry_dir.glob("work/helm/open/*/answers.jsonl")
        return record, used, len(journal.read_text().splitlines())

    stopped, used, answers = ask(MINUTE)
    print(f"{answers} answers in {used} s")
    assert (stopped.state, used) == (State.TIME_LIMIT, MINUTE)
    planned = sum(run.instances for run in stopped.runs)
    missing = planned - sum(run.answered for run in stopped.runs)
    assert 0 < missing < planned
    assert stopped.reason == f"{missing} of {planned} instances unanswered"
    # What is not answered is wrong, as the configuration says: every plain column has a value.
    table = pq.read_table(entry_dir / "helm/open/metrics.parquet")
    columns = columns_of(competition, "open")
    for column, cell in zip(columns, stage_cells(competition, "open", stopped.runs, table), strict=True):
        assert column.metric != "EM" or cell.value is not None, column

    whole, used, in_all = ask(3600)
    print(f"{in_all - answers} more when the limit was lifted, {used} s together")
    assert whole.state is State.FINISHED
    assert all(run.answered == run.instances for run in whole.runs)
    assert served[1] == in_all - answers

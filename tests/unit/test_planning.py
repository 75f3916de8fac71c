"""What is due, from the records and the config alone: no Snakemake, no SLURM, steps that only write records.

A night of an organizer is a sequence of edits, decisions and starts; a start may die anywhere. Whatever the
sequence, one start that lives brings every record to the config, and nothing runs that need not.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palio import planning, steps
from palio.config import Entry
from palio.errors import Interrupted
from palio.layout import EntryFolder
from palio.operating.kept import keep, let_go, put_back
from palio.pipeline import BY_NAME, LIMITED, Step, steps_of
from palio.provenance import fingerprint
from palio.records import Made
from palio.scoring.leaderboard import score_track
from palio.settings import CurateSettings, PlannedEntry, RunOptions
from palio.workflow import Workflow
from tests.support.folder import WorkingFolder
from tests.support.records import leave_payload, leave_record, leave_shared_records

ENTRIES = ("curated", "raw", "untuned")
MOMENTS = (
    "before",
    "outputs deleted",
    "payload replaced",
    "record not stamped",
    "outputs deleted in its last seconds",
    "after",
)
"""Where in a step a controller may die."""


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    folder = WorkingFolder.create(tmp_path_factory.mktemp("planning") / "competition")
    with chdir(folder.path):
        made = Workflow(Path("config/config.yaml"))
        assert made.active
        return made


class Died(Exception):
    """The controller is gone."""


@dataclass
class Night:
    """A competition under an organizer's hands."""

    workflow: Workflow
    entries: dict[str, PlannedEntry]
    ran: list[tuple[str, str]] = field(default_factory=list)
    """(entry, step) of the last start, as they were begun."""
    last: dict[tuple[str, str], Made] = field(default_factory=dict)
    """What each step was last completed with."""
    replaced: set[tuple[str, str]] = field(default_factory=set)
    """Steps that died with their old folder replaced: that work is gone."""

    def folder(self, entry: str) -> EntryFolder:
        return self.workflow.results.entry(self.entries[entry].entry.track, entry)

    def active(self) -> list[str]:
        return [name for name, one in self.entries.items() if name not in one.competition.withdrawn]

    def due(self, entry: str) -> dict[str, str]:
        return planning.due(self.entries[entry], self.folder(entry), self.workflow.resources)

    # --- what an organizer does

    def edit_entry(self, name: str, section: str, key: str, value: Any) -> None:
        entry = self.entries[name].entry
        assert isinstance(entry, Entry)
        if part := getattr(entry, section):
            entry = entry.model_copy(update={section: part.model_copy(update={key: value})})
            self.entries[name] = replace(self.entries[name], entry=entry)

    def edit_all(self, change: Callable[[PlannedEntry], PlannedEntry]) -> None:
        self.entries = {name: change(one) for name, one in self.entries.items()}

    def edit_competition(self, **changes: Any) -> None:
        self.edit_all(lambda one: replace(one, competition=one.competition.model_copy(update=changes)))

    def edit_stage(self, stage: Any, questions: int) -> None:
        def asked(one: PlannedEntry) -> PlannedEntry:
            runs = one.stage_runs[stage]
            scenarios = {
                name: scenario.model_copy(update={"max_eval_instances": questions})
                for name, scenario in runs.scenarios.items()
            }
            changed = runs.model_copy(update={"scenarios": scenarios})
            return replace(one, stage_runs={**one.stage_runs, stage: changed})

        self.edit_all(asked)

    def edit_limit(self, seconds: int) -> None:
        def limited(one: PlannedEntry) -> PlannedEntry:
            stages = one.competition.stages
            changed = stages.model_copy(
                update={"open": stages.open.model_copy(update={"time_limit": seconds})}
            )
            return replace(one, competition=one.competition.model_copy(update={"stages": changed}))

        self.edit_all(limited)

    def edit_rules(self, max_length: int) -> None:
        self.edit_all(lambda one: replace(one, rules=one.rules.model_copy(update={"max_length": max_length})))

    def retry(self, entry: str, step: str) -> None:
        retries = self.entries[entry].competition.retries
        granted = {**retries.get(entry, {})}
        granted[step] = granted.get(step, 0) + 1
        self.edit_competition(retries={**retries, entry: granted})

    def withdraw(self, entry: str, back: bool) -> None:
        withdrawn = dict(self.entries[entry].competition.withdrawn)
        withdrawn.pop(entry, None) if back else withdrawn.update({entry: "asked to"})
        self.edit_competition(withdrawn=withdrawn)

    # --- what a controller does

    def start(self, dies_at: tuple[int, str] | None = None) -> None:
        """Run what is due, in order, as Snakemake does; die in the n-th step, if there is one."""
        self.ran = []
        for entry in self.entries:
            put_back(self.folder(entry))
        plan = [(entry, BY_NAME[name]) for entry in self.active() for name in self.due(entry)]
        holding = self._holding({(entry, step.name) for entry, step in plan})
        for entry, step in plan:
            keep(step, self.folder(entry))
        try:
            for number, (entry, step) in enumerate(plan):
                at = dies_at[1] if dies_at and dies_at[0] == number else ""
                self._run(entry, step, at)
        except Died:
            pass
        else:
            for entry in self.entries:
                put_back(self.folder(entry))
                let_go(self.folder(entry))
        assert {path: path.read_bytes() for path in holding} == holding, "what holds is not touched"

    def _holding(self, due: set[tuple[str, str]]) -> dict[Path, bytes]:
        records = [
            step.record(self.folder(entry))
            for entry in self.active()
            for step in steps_of(self.entries[entry].entry)
            if (entry, step.name) not in due
        ]
        return {path: path.read_bytes() for path in records if path.exists()}

    def _run(self, entry: str, step: Step, dies_at: str) -> None:
        def moment(name: str) -> None:
            if name == dies_at:
                raise Died

        folder, key = self.folder(entry), (entry, step.name)
        settings_ = step.settings.of(self.entries[entry], step.name)
        moment("before")
        self.ran.append(key)
        self._delete_outputs(step, folder)
        moment("outputs deleted")
        if any(not path.suffix for path in step.payload(folder)):
            self.replaced.add(key)
        leave_payload(step, folder)
        moment("payload replaced")
        made = planning.made(step, folder, settings_, self.workflow.resources)
        leave_record(step, folder, settings_, self.workflow)
        if dies_at == "record not stamped":
            record = step.record(folder)
            content = {
                name: value for name, value in json.loads(record.read_text()).items() if name != "made"
            }
            record.write_text(json.dumps(content))
        moment("record not stamped")
        if key not in self.replaced:
            assert self.last.get(key) != made, f"{key} ran twice for the same settings"
        self.replaced.discard(key)
        self.last[key] = made
        keep(step, folder)
        if dies_at == "outputs deleted in its last seconds":
            self._delete_outputs(step, folder)
        moment("outputs deleted in its last seconds")
        moment("after")

    def _delete_outputs(self, step: Step, folder: EntryFolder) -> None:
        """As Snakemake does with declared outputs, before a job and when it is cancelled."""
        for path in (step.record(folder), *step.payload(folder)):
            if path.is_file():
                path.unlink()

    # --- what must be true in the morning

    def check(self) -> None:
        self.start()
        for entry in self.active():
            planned, folder = self.entries[entry], self.folder(entry)
            assert self.due(entry) == {}
            for step in steps_of(planned.entry):
                made = planning.made_of(step.record(folder))
                assert made is not None
                wanted = fingerprint(step.settings.of(planned, step.name).decisive)
                assert made.settings[step.name] == wanted
                for name, before in made.settings.items():
                    assert before == fingerprint(BY_NAME[name].settings.of(planned, name).decisive)
        self.start()
        assert self.ran == [], "a start with nothing to do does nothing"


def test_a_source_that_vanished_is_no_rule_violation_of_the_entry(workflow: Workflow, tmp_path: Path) -> None:
    """
    | a team's file that is gone | nothing: `palio status` warns; if it must be read again, that step is
      `interrupted` |
    """
    with chdir(tmp_path):
        leave_shared_records(workflow)
        source = Path("resources/demo_sources/pattern_match.jsonl")
        night = Night(workflow, {"raw": workflow.planned("raw")})
        settings_ = CurateSettings.of(night.entries["raw"], "curate")
        paths = [Path(file) for file in settings_.files()]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{source}")
        night.start()
        for path in paths:
            path.unlink()
        assert night.due("raw") == {}
        assert planning.sources_gone(night.entries["raw"]) == sorted(map(str, paths))
        with pytest.raises(Interrupted, match="was read before and is gone; bring it back"):
            steps.run("curate", night.folder("raw"), settings_, RunOptions())
        paths[0].write_text("other rows")
        assert "curate" in night.due("raw")


def test_a_record_tells_which_setting_differs(workflow: Workflow, tmp_path: Path) -> None:
    with chdir(tmp_path):
        leave_shared_records(workflow)
        night = Night(workflow, {"raw": workflow.planned("raw")})
        night.start()
        night.edit_entry("raw", "finetune", "learning_rate", 7e-4)
        wrong = "made with recipe.learning_rate 0.002, the config says 0.0007"
        assert night.due("raw") == {
            "finetune": wrong,
            "package": f"finetune was {wrong}",
            "open": f"finetune was {wrong}",
            "closed": f"finetune was {wrong}",
        }
        board = score_track(
            workflow.competition,
            "laptop",
            workflow.results,
            {"raw": workflow.entries["raw"]},
            final=False,
            due=lambda folder, _: night.due("raw"),
        )
        (stopped,) = board.did_not_finish
        assert (stopped.step, stopped.reason) == ("finetune", f"{wrong}; run again, or restore the config")


entry_ids = st.sampled_from(ENTRIES)
events = st.one_of(
    st.tuples(st.just("start"), st.none()),
    st.tuples(st.just("start"), st.tuples(st.integers(0, 20), st.sampled_from(MOMENTS))),
    st.tuples(
        st.just("edit_entry"),
        entry_ids,
        st.just("finetune"),
        st.just("learning_rate"),
        st.sampled_from([1e-4, 2e-4]),
    ),
    st.tuples(st.just("edit_entry"), entry_ids, st.just("dataset"), st.just("seed"), st.sampled_from([1, 2])),
    st.tuples(st.just("edit_stage"), st.sampled_from(["open", "closed"]), st.sampled_from([7, 8])),
    st.tuples(st.just("edit_limit"), st.sampled_from([60, 90])),
    st.tuples(st.just("edit_rules"), st.sampled_from([512, 1024])),
    st.tuples(st.just("retry"), entry_ids, st.sampled_from([step.name for step in LIMITED])),
    st.tuples(st.just("withdraw"), entry_ids, st.booleans()),
)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(sequence=st.lists(events, max_size=10))
def test_whatever_happens_in_the_night_one_start_brings_every_record_to_the_config(
    workflow: Workflow, sequence: list[tuple[Any, ...]]
) -> None:
    with tempfile.TemporaryDirectory() as place, chdir(place):
        leave_shared_records(workflow)
        night = Night(workflow, {name: workflow.planned(name) for name in ENTRIES})
        for event, *arguments in sequence:
            getattr(night, event)(*arguments)
        night.check()

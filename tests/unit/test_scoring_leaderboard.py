"""From cells to a ranked leaderboard, and from a results folder to its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palio.config import BaseModelSource, Competition, Entry, Metric, load_competition
from palio.entries import AnyEntry, BrokenEntry
from palio.errors import BadInput, PalioError, State
from palio.layout import Boards, Results
from palio.provenance import canonical_json, file_sha256
from palio.records import (
    Cell,
    Column,
    HelmRun,
    Leaderboard,
    StageRecord,
    StepFailure,
)
from palio.records.tables import INSTANCES_SCHEMA, METRICS_SCHEMA
from palio.scoring.columns import columns_of
from palio.scoring.leaderboard import (
    Candidate,
    score,
    score_track,
)
from palio.scoring.tables import latex, leaderboard_rows, markdown, print_leaderboard, write_leaderboard

COLUMNS = [
    Column(stage="open", scenario="mmlu", metric="EM"),
    Column(stage="open", scenario="bbq", metric="EM"),
    Column(stage="closed", scenario="math", metric="EM"),
    Column(stage="closed", scenario="math", metric="toxicity", higher_is_better=False),
]
WEIGHTS = {"open": 1 / 3, "closed": 2 / 3}


def candidate(name: str, *values: float | None, state: State = State.TIME_LIMIT) -> Candidate:
    cells = [
        Cell(value=value, n=10) if value is not None else Cell(value=None, state=state, reason="too slow")
        for value in values
    ]
    return Candidate(name, f"team {name}", cells)


def board_of(*candidates: Candidate, **settings: Any) -> Leaderboard:
    given = {"columns": COLUMNS, "stage_weights": WEIGHTS, "competition": "c", "track": "t"} | settings
    return score(candidates=candidates, **given)


def test_the_formula_by_hand() -> None:
    board = board_of(
        candidate("a", 0.9, 0.1, 0.5, 0.5),
        candidate("b", 0.5, 0.2, 0.6, 0.1),
        candidate("c", 0.1, 0.3, 0.7, 0.9),
    )
    b = next(one for one in board.entries if one.entry == "b")
    assert b.scenario_win_rates == {"open": {"mmlu": 0.5, "bbq": 0.5}, "closed": {"math": 0.75}}
    assert b.final_score == pytest.approx(0.5 / 3 + 2 * 0.75 / 3)
    assert (board.entries[0].entry, b.rank) == ("b", 1)


def test_equal_scores_share_the_better_rank() -> None:
    board = board_of(candidate("z", 1, 1, 1, 0), candidate("a", 1, 1, 1, 0), candidate("m", 0, 0, 0, 1))
    assert [(one.entry, one.rank) for one in board.entries] == [("a", 1), ("z", 1), ("m", 3)]


def test_a_zero_says_which_scenario_and_which_columns() -> None:
    board = board_of(candidate("a", 0.9, None, 0.5, 0.1), candidate("b", 0.1, 0.2, 0.4, 0.2))
    a = next(one for one in board.entries if one.entry == "a")
    assert a.stage_scores["open"] == 0
    assert any("open score is 0" in note and "bbq (EM missing)" in note for note in a.notes)
    assert any("EM is missing (time limit: too slow); counted as worse" in note for note in a.notes)


def test_exclude_leaves_the_column_out_and_says_so() -> None:
    board = board_of(
        candidate("a", 0.9, None, 0.5, 0.1), candidate("b", 0.1, 0.2, 0.4, 0.2), missing="exclude"
    )
    a = board.entries[0]
    assert (a.entry, a.stage_scores["open"], a.cells[1].win_rate) == ("a", 1.0, None)
    assert "left out" in a.notes[0]


def test_no_mention_of_a_group_is_no_loss_unless_the_metric_or_a_convention_of_2023_says_so() -> None:
    def share(missing: str | None, convention: str = "midrank") -> float:
        columns = [*COLUMNS[:3], COLUMNS[3].model_copy(update={"missing": missing})]
        silent, other = candidate("a", 0.9, 0.9, 0.9, None), candidate("b", 0.1, 0.1, 0.1, 0.2)
        board = board_of(silent, other, columns=columns, convention=convention)
        (found,) = [entry for entry in board.entries if entry.entry == "a"]
        return found.scenario_win_rates["closed"]["math"]

    assert share("exclude") == 1.0
    assert share("worst") == share(None) == 0.5
    assert share("exclude", "hidden2023") == 0.25  # (1 of 2 worse + 0) / 2 columns: its rule is its own


def test_a_bias_column_excludes_no_mention_by_default_and_does_not_block() -> None:
    settings = competition()
    scenario = next(iter(settings.stages.open.scenarios.values()))
    bias = Metric(metric="bias_metric:mode=representation,demographic_category=race", higher_is_better=False)
    scenario.metrics["Representation"] = bias
    scenario.metrics["Strict"] = bias.model_copy(update={"missing": "worst"})
    by_name = {column.metric: column.missing for column in columns_of(settings, "open")}
    assert (by_name["Representation"], by_name["Strict"]) == ("exclude", "worst")


def test_an_entry_without_any_value_in_a_stage_did_not_finish_under_exclude() -> None:
    board = board_of(
        candidate("a", None, None, 0.5, 0.1), candidate("b", 0.1, 0.2, 0.4, 0.2), missing="exclude"
    )
    assert [one.entry for one in board.entries] == ["b"]
    (stopped,) = board.did_not_finish
    assert (stopped.entry, stopped.step, stopped.state) == ("a", "open", State.TIME_LIMIT)


def test_block_names_entry_and_column() -> None:
    with pytest.raises(PalioError, match="a: bbq, EM is missing"):
        board_of(candidate("a", 0.9, None, 0.5, 0.1), missing="block")


def test_one_entry_alone_scores_one_half_and_says_why() -> None:
    (only,) = board_of(candidate("a", 0.9, 0.1, 0.5, 0.1)).entries
    assert only.final_score == pytest.approx(0.5)
    assert "no rival" in only.notes[0]


def test_no_entry_gives_an_empty_leaderboard() -> None:
    assert board_of().entries == []


def test_all_missing_ties_everybody_with_notes() -> None:
    board = board_of(candidate("a", None, None, None, None), candidate("b", None, None, None, None))
    assert [one.rank for one in board.entries] == [1, 1]
    assert all(len(one.notes) == len(COLUMNS) for one in board.entries)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(BadInput, match="a: mmlu, EM"):
        board_of(candidate("a", value, 0.1, 0.5, 0.1))


def test_a_duplicate_entry_and_a_duplicate_column_are_refused() -> None:
    with pytest.raises(BadInput, match="entries is 'a': is duplicated"):
        board_of(candidate("a", 1, 1, 1, 1), candidate("a", 0, 0, 0, 0))
    with pytest.raises(BadInput, match="is duplicated"):
        board_of(candidate("a", 1, 1), columns=[COLUMNS[0], COLUMNS[0]])


VALUE = st.one_of(st.none(), st.integers(0, 4).map(lambda whole: whole / 4))
POOLS = st.lists(st.tuples(VALUE, VALUE, VALUE, VALUE), min_size=1, max_size=7)


@given(POOLS, st.randoms(use_true_random=False), st.sampled_from(["midrank", "helm2023", "final2023"]))
def test_the_order_of_the_entries_changes_nothing(pool: list[Any], random: Any, convention: str) -> None:
    candidates = [candidate(f"entry{number}", *values) for number, values in enumerate(pool)]
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert board_of(*shuffled, convention=convention) == board_of(*candidates, convention=convention)


@given(POOLS)
def test_a_better_value_never_lowers_its_entry(pool: list[Any]) -> None:
    candidates = [candidate(f"entry{number}", *values) for number, values in enumerate(pool)]
    better = [candidate("entry0", 2.0, *pool[0][1:]), *candidates[1:]]

    def final(given: list[Candidate]) -> float:
        return next(one.final_score for one in board_of(*given).entries if one.entry == "entry0")

    assert final(better) >= final(candidates) - 1e-12


# --- a results folder ---------------------------------------------------------------------------------


def competition(**scoring: str) -> Competition:
    def stage(title: str, weight: str, scenario: str) -> dict[str, Any]:
        return {
            "title": title,
            "weight": weight,
            "time_limit": "10m",
            "margin": "5m",
            "scenarios": {
                scenario: {
                    "run_entries": "x.conf",
                    "max_eval_instances": 4,
                    "metrics": {"EM": {"metric": "exact_match"}},
                }
            },
        }

    return Competition.model_validate(
        {
            "competition": "small",
            "title": "Small",
            "entries": ["entries"],
            "rules": "rules.yaml",
            "closed_store": "~/closed",
            "withdrawn": {"gone": "left the city"},
            "scoring": scoring,
            "tracks": {"t": {"title": "T", "ram_gb": 1, "training_budget": "1h", "training_margin": "1h"}},
            "stages": {"open": stage("Open", "1/3", "mmlu"), "closed": stage("Closed", "2/3", "math")},
        }
    )


def entry(name: str) -> Entry:
    return Entry(team=f"team {name}", track="t", base_model=BaseModelSource(path="/m"))


def leave_results(results: Path, name: str, values: dict[str, list[float | None]], **changes: Any) -> Path:
    """What the workflow leaves of an untuned entry: per stage one HELM run of ten instances per value,
    of which so many are right; None for a run that the time limit cut."""
    folder = results / "t" / name
    for step in ("check.json", "package.json"):
        (folder / step).parent.mkdir(parents=True, exist_ok=True)
        (folder / step).write_text("{}")
    for stage, of_runs in values.items():
        scenario = {"open": "mmlu", "closed": "math"}[stage]
        at = {
            "competition": "small",
            "track": "t",
            "entry": name.partition("/")[0],
            "stage": stage,
            "scenario": scenario,
        }
        statistic: dict[str, Any] = {"metric": "exact_match", "split": "test", "perturbation": None}
        rows: list[dict[str, Any]] = [
            {**at, "run": f"{scenario}:{number}", **statistic, "value": value, "n": 10}
            for number, value in enumerate(of_runs)
            if value is not None
        ]
        answers = [
            {
                **at,
                "run": row["run"],
                "instance": f"id{i}",
                **statistic,
                "value": float(i < round(10 * row["value"])),
            }
            for row in rows
            for i in range(10)
        ]
        tables = folder / "helm" / stage
        tables.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=METRICS_SCHEMA), tables / "metrics.parquet")
        pq.write_table(pa.Table.from_pylist(answers, schema=INSTANCES_SCHEMA), tables / "instances.parquet")
        cut = [value is None for value in of_runs]
        content = {
            **{key: at[key] for key in ("competition", "track", "entry", "stage")},
            "package_fingerprint": "p",
            "instances_sha256": "i",
            "helm_version": "0.5.16",
            "state": State.TIME_LIMIT if any(cut) else State.FINISHED,
            "runs": [
                HelmRun(
                    scenario=scenario,
                    run=f"{scenario}:{number}",
                    state=State.TIME_LIMIT if lost else State.FINISHED,
                    reason="the stage's limit ran out" if lost else "",
                    instances=10,
                    answered=0 if lost else 10,
                )
                for number, lost in enumerate(cut)
            ],
            "metrics_sha256": file_sha256(tables / "metrics.parquet"),
            "instances_table_sha256": file_sha256(tables / "instances.parquet"),
        }
        StageRecord.model_validate(content | changes).write(folder / f"{stage}.json")
    return folder


def test_a_track_is_scored_from_what_the_workflow_left(tmp_path: Path) -> None:
    leave_results(tmp_path, "good", {"open": [0.8, 0.6], "closed": [0.5]})
    leave_results(tmp_path, "poor", {"open": [0.2, 0.4], "closed": [0.1]})
    board = score_track(
        competition(), "t", Results(tmp_path), {n: entry(n) for n in ("good", "poor")}, final=True
    )
    assert [(one.entry, one.team, one.rank) for one in board.entries] == [
        ("good", "team good", 1),
        ("poor", "team poor", 2),
    ]
    assert board.entries[0].cells[0] == Cell(value=0.7, n=20, win_rate=1.0)
    assert board.inputs["t/good/open.json"] == file_sha256(tmp_path / "t/good/open.json")
    assert len(board.inputs) == 12


def test_a_column_with_an_unfinished_run_is_missing_not_a_mean_over_fewer(tmp_path: Path) -> None:
    leave_results(tmp_path, "slow", {"open": [0.9, None], "closed": [0.5]})
    leave_results(tmp_path, "poor", {"open": [0.2, 0.4], "closed": [0.1]})
    board = score_track(
        competition(), "t", Results(tmp_path), {n: entry(n) for n in ("slow", "poor")}, final=True
    )
    cell = next(one for one in board.entries if one.entry == "slow").cells[0]
    assert (cell.value, cell.state, cell.win_rate) == (None, State.TIME_LIMIT, 0.0)
    assert cell.reason == "1 of 2 runs finished: the stage's limit ran out"


def test_standings_name_step_state_reason_and_log_of_the_unfinished(tmp_path: Path) -> None:
    leave_results(tmp_path, "good", {"open": [0.8], "closed": [0.5]})
    leave_results(tmp_path, "half", {"open": [0.8]})
    broken = tmp_path / "t/broken/work/failures/check.json"
    StepFailure(step="check", state=State.RULE_VIOLATION, reason="not approved", log="x.log").write(broken)
    entries: dict[str, AnyEntry] = {name: entry(name) for name in ("good", "half", "gone")}
    entries["broken"] = BrokenEntry("t", BadInput("broken.yaml", why="is wrong"))
    board = score_track(competition(), "t", Results(tmp_path), entries, final=False)
    assert [one.entry for one in board.entries] == ["good"]
    assert [(one.entry, one.step, one.state.value, one.reason, one.log) for one in board.did_not_finish] == [
        ("broken", "check", "rule_violation", "not approved", "x.log"),
        ("gone", "", "withdrawn", "left the city", None),
        ("half", "closed", "not_run", "not run yet", None),
    ]


def test_the_final_leaderboard_needs_every_entry_finished_or_withdrawn(tmp_path: Path) -> None:
    leave_results(tmp_path, "good", {"open": [0.8], "closed": [0.5]})
    entries = {name: entry(name) for name in ("good", "gone", "late")}
    with pytest.raises(PalioError, match=r"1 of 3 entries of t .*late \(check: not run yet\)"):
        score_track(competition(), "t", Results(tmp_path), entries, final=True)
    del entries["late"]
    board = score_track(competition(), "t", Results(tmp_path), entries, final=True)
    assert [one.state for one in board.did_not_finish] == [State.WITHDRAWN]


def test_a_table_that_differs_from_its_record_is_not_scored(tmp_path: Path) -> None:
    folder = leave_results(tmp_path, "good", {"open": [0.8], "closed": [0.5]})
    table = folder / "helm/open/metrics.parquet"
    row = pq.read_table(table).to_pylist()[0] | {"value": 1.0}
    pq.write_table(pa.Table.from_pylist([row], schema=METRICS_SCHEMA), table)
    with pytest.raises(BadInput, match=r"metrics.parquet: differs from open.json; run helm_open again"):
        score_track(competition(), "t", Results(tmp_path), {"good": entry("good")}, final=True)
    board = score_track(competition(), "t", Results(tmp_path), {"good": entry("good")}, final=False)
    assert board.entries == []
    assert "differs from open.json" in board.did_not_finish[0].reason


def test_entries_that_answered_other_questions_are_not_mixed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        leave_results(tmp_path, name, {"open": [0.8], "closed": [0.5]})
    leave_results(tmp_path, "old", {"open": [0.8], "closed": [0.5]}, instances_sha256="older")
    entries = {name: entry(name) for name in ("a", "b", "old")}
    board = score_track(competition(), "t", Results(tmp_path), entries, final=False)
    assert [one.entry for one in board.did_not_finish] == ["old"]
    with pytest.raises(PalioError, match="other instances"):
        score_track(competition(), "t", Results(tmp_path), entries, final=True)


def test_standings_under_block_show_a_missing_value_as_not_finished(tmp_path: Path) -> None:
    leave_results(tmp_path, "slow", {"open": [None], "closed": [0.5]})
    leave_results(tmp_path, "good", {"open": [0.2], "closed": [0.1]})
    entries = {name: entry(name) for name in ("slow", "good")}
    board = score_track(competition(missing="block"), "t", Results(tmp_path), entries, final=False)
    assert [one.entry for one in board.entries] == ["good"]
    assert "mmlu, EM is missing" in board.did_not_finish[0].reason


def test_a_duplicate_statistic_is_refused(tmp_path: Path) -> None:
    folder = leave_results(tmp_path, "good", {"open": [0.8], "closed": [0.5]})
    table = folder / "helm/open/metrics.parquet"
    row = pq.read_table(table).to_pylist()[0]
    pq.write_table(pa.Table.from_pylist([row, row], schema=METRICS_SCHEMA), table)
    record = json.loads((folder / "open.json").read_text()) | {"metrics_sha256": file_sha256(table)}
    (folder / "open.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match="exact_match of mmlu:0: is duplicated"):
        score_track(competition(), "t", Results(tmp_path), {"good": entry("good")}, final=True)


# --- files --------------------------------------------------------------------------------------------


def test_every_file_of_the_leaderboard_tells_the_same(tmp_path: Path) -> None:
    board = board_of(candidate("a", 0.9, None, 0.5, 0.1), candidate("b_1", 0.1, 0.2, 0.4, 0.2))
    write_leaderboard(board, Boards(tmp_path))
    assert Leaderboard.model_validate_json((tmp_path / "t.json").read_text()) == board
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert rows == leaderboard_rows(board)
    assert rows[0]["closed/math/toxicity"] in (0.1, 0.2)
    assert (tmp_path / "t.csv").read_text().splitlines()[0].startswith("rank,entry,team,state")
    assert r"| a \[1,2\] |" in markdown(board)
    assert r"b\_1" in latex(board)


def test_the_terminal_shows_every_entry_and_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    print_leaderboard(board_of(candidate("a", 0.9, None, 0.5, 0.1), candidate("b", 0.1, 0.2, 0.4, 0.2)))
    shown = capsys.readouterr().out
    assert "a [1,2]" in shown
    assert "bbq" in shown


def test_a_rule_and_a_person_score_the_same_columns_in_the_same_order() -> None:
    """A rule passes the competition on as JSON with sorted keys, a person names its YAML file."""
    file = Path(__file__).parents[2] / "config/config.yaml"
    typed = load_competition(file)
    passed_on = load_competition(json.loads(canonical_json(typed.model_dump(mode="json", exclude_none=True))))
    assert columns_of(typed) == columns_of(passed_on)

"""The analysis of a track from its results folder; overfitting; score versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from palio.config import Competition
from palio.errors import BadInput
from palio.layout import Boards, Results
from palio.provenance import file_sha256
from palio.records import Analysis, Cell, Column, Contamination, Leaderboard
from palio.records.tables import INSTANCES_SCHEMA
from palio.scoring.analysis import analyze, analyze_track, read_answers
from palio.scoring.leaderboard import Candidate, score, score_track
from palio.scoring.overfitting import pearson, spearman
from palio.scoring.tables import print_leaderboard, write_leaderboard
from palio.scoring.versions import difference, read_leaderboard, rescore, write_version
from tests.unit.test_scoring_leaderboard import competition, entry, leave_results

NAMES = ("good", "mid", "poor")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    leave_results(tmp_path, "good", {"open": [0.8, 0.6], "closed": [0.7]})
    leave_results(tmp_path, "mid", {"open": [0.8, 0.4], "closed": [0.4]})
    leave_results(tmp_path, "poor", {"open": [0.2, 0.4], "closed": [0.1]})
    return tmp_path


def scored(results: Path, **scoring: str) -> Leaderboard:
    return score_track(
        competition(**scoring), "t", Results(results), {name: entry(name) for name in NAMES}, final=True
    )


def test_a_track_is_analyzed_from_its_instances(results: Path) -> None:
    found = analyze_track(competition(), scored(results), Results(results))
    assert found.uncertainty is not None
    assert (found.uncertainty.method, found.uncertainty.instances) == ("bootstrap", 30)
    assert found.uncertainty.entries[0].entry == "good"
    assert found.robustness is not None
    assert [one.removed for one in found.robustness.without_scenario] == ["open/mmlu", "closed/math"]
    assert found.overfitting is not None
    assert found.overfitting.entries[0].contamination_reason == "no training data"


def test_the_analysis_is_one_record_beside_the_leaderboard(results: Path, tmp_path: Path) -> None:
    found = analyze_track(competition(), scored(results), Results(results))
    write_leaderboard(scored(results), Boards(tmp_path / "leaderboard"), found)
    path = tmp_path / "leaderboard/t.analysis.json"
    assert Analysis.model_validate_json(path.read_text()) == found
    row = pq.read_table(tmp_path / "leaderboard/t.parquet").to_pylist()[0]
    assert found.uncertainty is not None
    assert row["p_first"] == found.uncertainty.entries[0].p_first
    assert "P(first)" in (tmp_path / "leaderboard/t.md").read_text()


def test_an_analysis_of_an_earlier_leaderboard_does_not_stay_beside_a_new_one(
    results: Path, tmp_path: Path
) -> None:
    board = scored(results)
    write_leaderboard(board, Boards(tmp_path / "leaderboard"), analyze(board, replicates=20))
    write_leaderboard(board, Boards(tmp_path / "leaderboard"))
    assert not list((tmp_path / "leaderboard").glob("*.analysis.*"))


def test_the_terminal_shows_intervals_groups_and_verdicts(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = scored(results)
    print_leaderboard(board, analyze_track(competition(), board, Results(results)), Console(width=200))
    shown = capsys.readouterr().out
    for words in ("95 % interval", "P(first)", "group", "1st place (good)", "Paired bootstrap"):
        assert words in shown


def test_contamination_stands_beside_the_scores(results: Path) -> None:
    Contamination(
        competition="small",
        track="t",
        entry="mid",
        ngram=13,
        dataset_sha256="d",
        instances={"open": {"mmlu": 20}, "closed": {"math": 10}},
        contaminated={"open": {"mmlu": 3}, "closed": {"math": 0}},
    ).write(results / "t/mid/contamination.json")
    found = analyze_track(competition(), scored(results), Results(results)).overfitting
    assert found is not None
    mid = next(one for one in found.entries if one.entry == "mid")
    assert mid.contamination is not None
    assert (mid.contamination["open"].contaminated, mid.contamination["open"].instances) == (3, 20)
    assert "Training data of mid contains evaluation instances." in found.text


def test_a_table_that_was_not_scored_is_not_analyzed(results: Path) -> None:
    board = scored(results)
    table = results / "t/mid/helm/open/instances.parquet"
    rows = pq.read_table(table).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows[:-1], schema=pq.read_schema(table)), table)
    with pytest.raises(BadInput, match="is not the table that was scored"):
        analyze_track(competition(), board, Results(results))


def test_answers_are_those_of_the_column_s_split_perturbation_and_runs(tmp_path: Path) -> None:
    """Two perturbed forms of a question count as one answer; a null is no answer."""
    asked: dict[str, Any] = {"metric": "exact_match", "split": "test", "perturbation": "fairness"}
    rows = [
        {"run": "b:1", "instance": "id1", **asked, "value": 1.0},
        {"run": "b:1", "instance": "id1", **asked, "value": 0.0},
        {"run": "b:1", "instance": "id0", **asked, "value": 1.0},
        {"run": "b:1", "instance": "id2", **asked, "value": None},
        {"run": "b:1", "instance": "id3", **asked, "split": "valid", "value": 1.0},
        {"run": "b:1", "instance": "id4", **asked, "perturbation": None, "value": 1.0},
        {"run": "b:1", "instance": "id5", **asked, "metric": "f1", "value": 1.0},
        {"run": "a:1", "instance": "id6", **asked, "value": 1.0},
    ]
    at = {"competition": "small", "track": "t", "entry": "e", "stage": "open", "scenario": "mmlu"}
    table = tmp_path / "t/e/helm/open/instances.parquet"
    table.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([at | row for row in rows], schema=INSTANCES_SCHEMA), table)
    column = {"metric": "exact_match", "perturbation": "fairness", "run": "b:"}
    content = competition().model_dump(mode="json")
    for stage in content["stages"].values():
        stage.update(time_limit="1m", margin="1m")
    content["tracks"]["t"].update(training_budget="1h", training_margin="1h")
    content["stages"]["open"]["scenarios"]["mmlu"]["metrics"] = {"fair": column}
    board = score(
        competition="small",
        track="t",
        columns=[Column(stage="open", scenario="mmlu", metric="fair")],
        candidates=[Candidate("e", "team", [Cell(value=0.75, n=2)])],
        stage_weights={"open": 1.0},
        inputs={"t/e/helm/open/instances.parquet": file_sha256(table)},
    )
    found = read_answers(Competition.model_validate(content), board, Results(tmp_path))["open", "mmlu"]
    assert found.runs.tolist() == [0, 0]
    assert found.columns[0] is not None
    assert found.columns[0].tolist() == [[1.0, 0.5]]


def test_standings_without_a_finished_entry_have_an_empty_analysis(tmp_path: Path) -> None:
    board = score_track(competition(), "t", Results(tmp_path), {"late": entry("late")}, final=False)
    found = analyze_track(competition(), board, Results(tmp_path))
    assert (found.uncertainty, found.robustness, found.overfitting) == (None, None, None)


# --- open against closed --------------------------------------------------------------------------------

X, Y = [0.1, 0.4, 0.2, 0.9, 0.5, 0.7], [0.3, 0.2, 0.1, 0.8, 0.9, 0.4]


def test_pearson_has_fisher_s_interval() -> None:
    expected = stats.pearsonr(X, Y)
    found = pearson(X, Y)
    interval = expected.confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((expected.statistic, *interval))


def test_spearman_is_pearson_s_of_the_ranks_with_a_wider_interval() -> None:
    found, of_ranks = spearman(X, Y), pearson(stats.rankdata(X), stats.rankdata(Y))
    assert found.value == pytest.approx(stats.spearmanr(X, Y).statistic)
    assert found.low is not None
    assert of_ranks.low is not None
    assert found.low < of_ranks.low


def test_a_correlation_that_is_not_defined_says_why() -> None:
    assert "needs at least 4" in pearson([1, 2, 3], [1, 2, 3]).reason
    assert "same score" in spearman([1, 1, 1, 1], [1, 2, 3, 4]).reason


def test_an_entry_that_falls_from_open_to_closed_has_a_rank_drop() -> None:
    columns = [
        Column(stage="open", scenario="mmlu", metric="EM"),
        Column(stage="closed", scenario="math", metric="EM"),
    ]
    rows = {"overfit": (0.9, 0.1), "b": (0.5, 0.5), "c": (0.4, 0.6), "d": (0.3, 0.4)}
    board = score(
        competition="c",
        track="t",
        columns=columns,
        candidates=[
            Candidate(name, name, [Cell(value=value, n=10) for value in of]) for name, of in rows.items()
        ],
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
    )
    found = analyze(board, replicates=50).overfitting
    assert found is not None
    fallen = next(one for one in found.entries if one.entry == "overfit")
    assert (fallen.open_rank, fallen.closed_rank, fallen.rank_drop) == (1, 4, 3)
    assert "The largest drop is overfit's: rank 1 on open, 4 on closed." in found.text


# --- versions -------------------------------------------------------------------------------------------


def test_rescoring_changes_the_rule_and_reruns_nothing(results: Path, tmp_path: Path) -> None:
    board = scored(results)
    again = rescore(board, competition(), Results(results), convention="final2023")
    assert again.convention == "final2023"
    assert again.inputs == board.inputs
    assert again == scored(results, convention="final2023")


def test_rescoring_refuses_results_that_changed(results: Path) -> None:
    board = scored(results)
    record = results / "t/mid/open.json"
    record.write_text(json.dumps(json.loads(record.read_text())))
    with pytest.raises(BadInput, match=r"open.json: changed since the leaderboard was made"):
        rescore(board, competition(), Results(results))


@pytest.mark.parametrize("wrong", [{"convention": "midrnk"}, {"missing": "zero"}])
def test_an_unknown_rule_names_the_known_ones(results: Path, wrong: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="use one of"):
        rescore(scored(results), competition(), Results(results), **wrong)


def test_versions_are_numbered_and_an_equal_one_is_not_written_twice(results: Path, tmp_path: Path) -> None:
    board, folder = scored(results), tmp_path / "leaderboard"
    other = rescore(board, competition(), Results(results), convention="final2023")
    third = rescore(board, competition(), Results(results), convention="helm2023")
    assert write_version(other, Boards(folder)).name == "t.v2.json"
    assert write_version(third, Boards(folder)).name == "t.v3.json"
    assert write_version(other, Boards(folder)).name == "t.v2.json"
    assert read_leaderboard(folder / "versions/t.v3.json") == third


COLUMNS = [
    Column(stage="open", scenario="mmlu", metric="EM"),
    Column(stage="open", scenario="bbq", metric="EM"),
    Column(stage="closed", scenario="math", metric="EM"),
]


def board_of(rows: dict[str, list[float | None]], **settings: Any) -> Leaderboard:
    given = {"columns": COLUMNS, "stage_weights": {"open": 1 / 3, "closed": 2 / 3}} | settings
    candidates = [
        Candidate(name, name, [Cell(value=value, n=10) for value in of[: len(given["columns"])]])
        for name, of in rows.items()
    ]
    return score(competition="c", track="t", candidates=candidates, **given)


ROWS: dict[str, list[float | None]] = {"a": [0.9, 0.2, 0.5], "b": [0.8, 0.9, 0.4], "c": [0.1, 0.5, 0.6]}


def test_equal_leaderboards_have_no_difference() -> None:
    found = difference(board_of(ROWS), board_of(ROWS))
    assert (found.changes, found.moved, str(found)) == ([], [], "the same scores")


def test_a_changed_value_explains_the_moves_it_causes() -> None:
    after: dict[str, list[float | None]] = {**ROWS, "c": [0.1, 0.5, 0.1]}
    found = difference(board_of(ROWS), board_of(after))
    (c,) = [move for move in found.moved if move.entry == "c"]
    assert [step.why for step in c.steps] == ["closed/math/EM 0.6 -> 0.1"]
    assert c.steps[0].effect.endswith("most by its win rate in closed/math 1.000 -> 0.000")
    assert str(c).startswith("c: rank ")
    assert all(step.change == "values" for move in found.moved for step in move.steps)


def test_an_entry_that_left_is_named_as_the_reason() -> None:
    without = {name: row for name, row in ROWS.items() if name != "b"}
    found = difference(board_of(ROWS), board_of(without))
    assert found.left == ["b"]
    assert found.changes == ["entries that left: b"]


def test_weights_convention_and_columns_are_told_apart() -> None:
    before = board_of(ROWS)
    after = board_of(
        {name: [mmlu, math] for name, (mmlu, _, math) in ROWS.items()},
        columns=[COLUMNS[0], COLUMNS[2]],
        convention="final2023",
        stage_weights={"open": 0.5, "closed": 0.5},
    )
    changes = [change.partition(":")[0] for change in difference(before, after).changes]
    assert changes == ["columns", "convention", "weights"]


def test_leaderboards_of_two_tracks_or_an_unknown_version_are_not_compared() -> None:
    board = board_of(ROWS)
    with pytest.raises(BadInput, match="give two of one track"):
        difference(board, board.model_copy(update={"track": "other"}))
    with pytest.raises(BadInput, match="rescore that leaderboard first"):
        difference(board.model_copy(update={"convention_version": "0"}), board)


VALUE = st.one_of(st.none(), st.integers(0, 4).map(lambda whole: whole / 4))
POOL = st.dictionaries(st.sampled_from("abcdef"), st.lists(VALUE, min_size=3, max_size=3), min_size=1)
SETTINGS = st.fixed_dictionaries(
    {
        "convention": st.sampled_from(["midrank", "helm2023", "final2023"]),
        "stage_weights": st.sampled_from([{"open": 1 / 3, "closed": 2 / 3}, {"open": 0.9, "closed": 0.1}]),
        "columns": st.sampled_from(
            [COLUMNS, [COLUMNS[0], COLUMNS[2].model_copy(update={"higher_is_better": False})]]
        ),
    }
)


@given(POOL, POOL, SETTINGS, SETTINGS)
def test_the_steps_of_every_move_lead_from_its_old_rank_to_its_new_one(
    before: dict[str, Any], after: dict[str, Any], rule_before: dict[str, Any], rule_after: dict[str, Any]
) -> None:
    a, b = board_of(before, **rule_before), board_of(after, **rule_after)
    rank_a = {one.entry: one.rank for one in a.entries}
    rank_b = {one.entry: one.rank for one in b.entries}
    moved = {move.entry: move for move in difference(a, b).moved}
    for name in rank_a.keys() & rank_b.keys():
        assert (name in moved) == (rank_a[name] != rank_b[name])
    for move in moved.values():
        path = [rank_a[move.entry]]
        for step in move.steps:
            assert step.before == path[-1]
            path.append(step.after)
        assert path[-1] == rank_b[move.entry]

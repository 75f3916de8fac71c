"""NeurIPS 2023's published tables: recomputed bit by bit, and read as leaderboards."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from palio.errors import BadInput, State
from palio.neurips2023.figure_data import published_figures
from palio.neurips2023.tables import (
    implied_instances,
    published,
    published_leaderboards,
    stable_id,
    stable_ids,
)

FOLDER = Path(os.environ.get("PALIO_SHARED", Path(__file__).parents[3] / "shared")) / "neurips2023"

ROUND_FILES = ("open_round_rank", "hidden_round_rank", "full_ranks_final_round")


@pytest.fixture
def tables() -> Path:
    if not FOLDER.is_dir():
        pytest.skip(f"the published tables are not at {FOLDER}; set PALIO_SHARED")
    return FOLDER


def test_every_derived_cell_of_the_4090_track_is_reproduced(tables: Path) -> None:
    found = published(tables)
    assert len(found.files) == 3
    assert [(one.entries, one.cells) for one in found.files] == [(57, 228), (31, 186), (8, 96)]
    assert (found.cells, found.mismatches) == (510, 0)
    assert found.max_abs_error <= 1e-12


def test_a_changed_value_is_found(tables: Path, tmp_path: Path) -> None:
    for path in tables.glob("*.json"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "4090_full_ranks_final_round.json"
    rows = json.loads(path.read_text())
    rows[0][1]["GSM8K - EM"] = 0.0
    path.chmod(0o644)
    path.write_text(json.dumps(rows))
    found = published(tmp_path)
    assert found.mismatches > 0
    assert found.max_abs_error > 0.01


def test_a_derived_cell_that_is_absent_is_a_mismatch(tables: Path, tmp_path: Path) -> None:
    rows = json.loads((tables / "4090_full_ranks_final_round.json").read_text())
    del rows[0][1]["Score_full"]
    (tmp_path / "4090_full_ranks_final_round.json").write_text(json.dumps(rows))
    assert published(tmp_path).mismatches == 1


def test_the_winner_and_the_published_scores_stand_in_the_leaderboard(tables: Path) -> None:
    boards = {board.track: board for board in published_leaderboards(tables)}
    final = boards["4090_final"]
    winner = final.entries[0]
    assert winner.entry == "akjindal53244_neurips_submission_submission_2"
    assert round(winner.final_score, 4) == 0.5786
    assert {stage: round(of, 4) for stage, of in winner.stage_scores.items()} == {
        "open": 0.5161,
        "closed": 0.6099,
    }
    assert final.convention == "final2023"
    assert len(boards["4090_rounds"].entries) == 30


def test_every_zero_of_the_published_final_is_explained(tables: Path) -> None:
    final = next(board for board in published_leaderboards(tables) if board.track == "4090_final")
    zeros = [(one, stage) for one in final.entries for stage, of in one.stage_scores.items() if of == 0]
    assert len(zeros) == 3
    for one, stage in zeros:
        assert any(note.startswith(f"The {stage} score is 0 because") for note in one.notes)


def test_midrank_changes_the_rank_of_44_of_57_open_entries_by_up_to_14_places(tables: Path) -> None:
    """41 of them for the ties alone (missing values left at 0, equal scores in the published order)."""
    by_convention = {}
    for convention in ("helm2023", "midrank"):
        board = published_leaderboards(tables, convention)[0]
        by_convention[convention] = {one.entry: one.rank for one in board.entries}
    moves = [abs(by_convention["midrank"][name] - rank) for name, rank in by_convention["helm2023"].items()]
    assert (sum(move > 0 for move in moves), max(moves)) == (44, 14)


def test_open_and_hidden_scores_are_correlated_over_the_entries_of_both_rounds(tables: Path) -> None:
    score_of = {
        name: {
            entry.removesuffix("_hidden"): cells["Score"]
            for entry, cells in json.loads((tables / f"4090_{name}_round_rank.json").read_text())
        }
        for name in ("open", "hidden")
    }
    both = sorted(score_of["open"].keys() & score_of["hidden"].keys())
    expected = np.corrcoef([[of[entry] for entry in both] for of in score_of.values()])[0, 1]
    found = published(tables).open_against_hidden["4090"]
    assert found.n == 30
    assert found.value == pytest.approx(expected)


def test_a_missing_value_of_2023_is_a_state(tables: Path) -> None:
    final = next(board for board in published_leaderboards(tables) if board.track == "4090_final")
    missing = [cell for one in final.entries for cell in one.cells if cell.value is None]
    assert len(missing) == 3
    assert {cell.state for cell in missing} == {State.NO_MENTION}


def test_names_of_one_entry_become_one_id() -> None:
    assert stable_id("tvergho_lm_neurips_train") == stable_id("tvergho_llm_neurips_train_hidden")


def test_two_rows_that_would_share_an_id_keep_their_names() -> None:
    names = ["acme_lit_gpt_hidden", "acme_hidden", "other_reproduce_eval"]
    assert stable_ids(names) == {
        "acme_lit_gpt_hidden": "acme_lit_gpt",
        "acme_hidden": "acme",
        "other_reproduce_eval": "other",
    }


def test_a_figure_s_mean_win_rate_is_the_share_of_smaller_values_over_all_cells_of_a_row(
    tables: Path,
) -> None:
    files = {name: json.loads((tables / f"4090_{name}.json").read_text()) for name in ROUND_FILES}
    pool: dict[str, list[float | None]] = {}
    for rows in files.values():
        for _, cells in rows:
            for column, value in cells.items():
                pool.setdefault(column, []).append(value)
    entry, cells = files["open_round_rank"][40]
    rates = [
        sum(value is not None and other is not None and other < value for other in pool[column])
        / (len(pool[column]) - 1)
        for column, value in cells.items()
    ]
    found = published_figures(tables)
    (point,) = [one for one in found.points if (one.round, one.entry) == ("open", entry)]
    assert point.mean_win_rate == pytest.approx(sum(rates) / len(rates))
    assert {(pair.x, pair.y): pair.pearson.n for pair in found.pairs} == {
        ("open", "hidden"): 30,
        ("hidden", "final"): 8,
        ("open", "final"): 8,
    }


def test_a_figure_s_column_points_pair_the_final_round_with_the_round_that_had_the_column(
    tables: Path,
) -> None:
    final = dict(json.loads((tables / "4090_full_ranks_final_round.json").read_text()))
    opened = dict(json.loads((tables / "4090_open_round_rank.json").read_text()))
    entry = "akjindal53244_neurips_submission_submission_2"
    (point,) = [
        one for one in published_figures(tables).columns if (one.entry, one.column) == (entry, "GSM8K - EM")
    ]
    assert (point.earlier, point.final) == (opened[entry]["GSM8K - EM"], final[entry]["GSM8K - EM"])


def test_the_number_of_instances_is_read_off_proportions() -> None:
    assert implied_instances([0.25, 0.5, 2 / 3]) == 12
    assert implied_instances([math.pi / 4]) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a list of"),
        ('[["a", {"X - WER": 1.0}]]', "unknown metric, so unknown direction"),
        ('[["a", {"MMLU - EM": 1.0}], ["a", {"MMLU - EM": 1.0}]]', "a: is duplicated"),
        ('[["a", {"MMLU - EM": NaN}]]', "a: MMLU - EM: has no value"),
        ('[["a", {"MMLU - EM": 1.0}], ["b", {}]]', "b: MMLU - EM: has no value"),
        ("[]", "has no entries"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x_open_round_rank.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        published(tmp_path)


def test_a_folder_without_tables_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"_hidden_round_rank\.json"):
        published(tmp_path)

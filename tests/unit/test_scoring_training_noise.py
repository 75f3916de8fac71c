"""Trainings of one entry with other seeds: what their noise is, and what it does to intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from palio.config import FinetuneRecipe
from palio.layout import EntryFolder, Results
from palio.records import AdapterManifest, Cell, Column, Leaderboard, Replicate, Uncertainty
from palio.scoring.analysis import analyze, analyze_track, read_answers
from palio.scoring.leaderboard import Candidate, score, score_track
from palio.scoring.tables import analysis_markdown, markdown
from palio.scoring.training_noise import training_effects
from palio.scoring.uncertainty import interaction, mean_of_trainings, uncertainty
from palio.scoring.versions import rescore
from tests.unit.test_scoring_leaderboard import competition, entry, leave_results

OPEN = Column(stage="open", scenario="mmlu", metric="EM")
CLOSED = Column(stage="closed", scenario="math", metric="EM")


def board_of(trainings: dict[str, list[list[float]]]) -> Leaderboard:
    """Entries with the values of their trainings, the own one first."""

    def cells(values: list[float]) -> list[Cell]:
        return [Cell(value=value, n=100) for value in values]

    candidates = [
        Candidate(
            name,
            name,
            cells(values[0]),
            trained=name != "untuned",
            replicates=[Replicate(number=place + 2, cells=cells(of)) for place, of in enumerate(values[1:])],
        )
        for name, values in trainings.items()
    ]
    return score(
        competition="c",
        track="t",
        columns=[OPEN, CLOSED],
        candidates=candidates,
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
    )


def found(board: Leaderboard, assumed: float | None = None) -> Uncertainty:
    made = uncertainty(board, {}, training_noise=assumed)
    assert made is not None
    return made


def test_the_noise_of_many_entries_is_recovered_with_its_correlation() -> None:
    draw = np.random.default_rng(0)
    trainings = {}
    for number in range(200):
        common = draw.normal(size=(3, 1))
        values = 0.5 + 0.02 * np.hstack([common, 2 * common + 0.5 * draw.normal(size=(3, 1))])
        trainings[f"entry{number:03}"] = values.tolist()
    effects = training_effects(board_of(trainings), [None, None])
    assert effects is not None
    covariance = effects.factor @ effects.factor.T
    assert covariance == pytest.approx(0.02**2 * np.array([[1, 2], [2, 4.25]]), rel=0.15)
    drawn = effects.draw(2000, np.random.default_rng(1)) @ effects.factor.T
    assert drawn[:, 0].std(axis=0) == pytest.approx(np.sqrt(np.diag(covariance) / 3), rel=0.35)


def test_what_more_questions_would_remove_is_no_noise_of_training() -> None:
    draw = np.random.default_rng(0)
    runs = np.zeros(400, dtype=np.int64)
    luck = (draw.random((3, 400)) < 0.5).astype(np.float32)  # each training guesses
    values = luck.mean(axis=1)
    expected = np.mean(
        [interaction((draw.random((3, 400)) < 0.5).astype(np.float32), runs) for _ in range(50)]
    )
    assert expected == pytest.approx(0.25 / 400, rel=0.05)
    board = board_of({"a": [[float(value)] * 2 for value in values], "b": [[0.1, 0.1]]})
    effects = training_effects(board, [np.array([interaction(luck, runs), np.nan])] * 2)
    assert effects is not None
    assert max(effects.record.standard_deviation.values()) < 0.03


def test_entries_with_a_lot_of_noise_have_wider_intervals_than_those_that_repeat_themselves() -> None:
    steady = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    noisy = [[0.5, 0.5], [0.7, 0.7], [0.3, 0.3]]
    effects = training_effects(board_of({"noisy": noisy, "steady": steady}), [None, None])
    assert effects is not None
    noise, none = effects.scale
    assert none == pytest.approx(
        8 / 10
    )  # shrunk: two trainings beyond the first do not prove that there is none
    assert noise > 1 > none


def test_without_replicates_and_assumption_nothing_but_the_questions_is_covered() -> None:
    made = found(board_of({"a": [[0.6, 0.6]], "b": [[0.5, 0.5]]}))
    assert made.training is None
    assert "cover the choice of questions only: not another training run, another seed" in made.explanation
    assert made.entries[0].questions_only is None


def test_an_assumption_widens_the_intervals_and_is_called_one() -> None:
    board = board_of({"a": [[0.6, 0.6]], "b": [[0.5, 0.5]], "c": [[0.4, 0.4]]})
    before, made = found(board), found(board, 0.1)
    assert made.training is not None
    assert (made.training.source, made.training.replicated) == ("assumption", [])
    assert "not measured but assumed" in made.explanation
    assert made.entries[0].questions_only == before.entries[0].final_score
    assert made.entries[0].final_score.low < before.entries[0].final_score.low
    assert made.entries[0].p_first < before.entries[0].p_first


def test_half_of_an_assumed_variance_moves_both_scenarios_together() -> None:
    """Effects that were independent would average out, and intervals cover too little."""
    effects = training_effects(board_of({"a": [[0.6, 0.6]], "b": [[0.5, 0.5]]}), [None, None], 0.1)
    assert effects is not None
    covariance = effects.factor @ effects.factor.T
    assert covariance == pytest.approx(0.1**2 * np.array([[1, 0.5], [0.5, 1]]))


def test_a_base_model_as_it_is_owes_nothing_to_a_training() -> None:
    effects = training_effects(board_of({"a": [[0.6, 0.6]], "untuned": [[0.5, 0.5]]}), [None, None], 0.1)
    assert effects is not None
    assert not effects.draw(100, np.random.default_rng(0))[:, 1].any()


def test_the_noise_of_replicated_entries_is_lent_to_the_others_and_said_so() -> None:
    board = board_of({"a": [[0.6, 0.6], [0.5, 0.5], [0.7, 0.7]], "b": [[0.5, 0.5]], "c": [[0.3, 0.3]]})
    made = found(board)
    assert made.training is not None
    assert (made.training.replicated, made.training.degrees) == (["a"], 2)
    assert "lent to the entries that were trained once" in made.explanation
    by_entry = {of.entry: of for of in made.entries}
    assert [by_entry[name].trainings for name in "abc"] == [3, 1, 1]
    assert by_entry["a"].mean_score == pytest.approx(board.entries[0].final_score)
    assert (by_entry["b"].training_share or 0) > 0.2


def test_the_mean_over_trainings_is_paired_by_question() -> None:
    first = np.array([[1, 0, np.nan, 1], [0, 0, 1, 1]], dtype=np.float32)
    assert mean_of_trainings(first).tolist() == [0.5, 0.0, 1.0, 1.0]


# --- from a results folder -------------------------------------------------------------------------------

NAMES = ("good", "mid", "poor")


def leave_adapter(folder: EntryFolder, weights: str) -> None:
    AdapterManifest(
        competition="small",
        track="t",
        entry=folder.entry_id,
        fingerprint="f",
        recipe_version="2",
        base_model="m",
        base_model_fingerprint="b",
        dataset_sha256="d",
        recipe={},
        rows=1,
        files={"adapter_model.safetensors": weights},
        state="finished",
        steps=1,
        planned_steps=1,
        rows_too_long=0,
        final_loss=1.0,
    ).write(folder.adapter_manifest)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Three entries; `good` was trained three times, `mid` twice."""
    leave_results(tmp_path, "good", {"open": [0.8, 0.6], "closed": [0.7]})
    leave_results(tmp_path, "good/replicates/2", {"open": [0.9, 0.6], "closed": [0.5]})
    leave_results(tmp_path, "good/replicates/3", {"open": [0.5, 0.6], "closed": [0.8]})
    leave_results(tmp_path, "mid", {"open": [0.8, 0.4], "closed": [0.4]})
    leave_results(tmp_path, "mid/replicates/2", {"open": [0.7, 0.4], "closed": [0.6]})
    leave_results(tmp_path, "poor", {"open": [0.2, 0.4], "closed": [0.1]})
    for name in ("good", "mid"):
        own = Results(tmp_path).entry("t", name)
        for number, folder in enumerate([own, *own.replicates()]):
            leave_adapter(folder, f"weights {number}")
    return Results(tmp_path)


def scored(results: Results, failing: str = "") -> Leaderboard:
    recipe = {"finetune": FinetuneRecipe()}
    return score_track(
        competition(),
        "t",
        results,
        {name: entry(name).model_copy(update=recipe) for name in NAMES},
        final=True,
        due=lambda folder, _: {"open": "not run yet"} if folder.name == failing else {},
    )


def test_replicates_are_beside_the_score_and_decide_no_rank(results: Results) -> None:
    board = scored(results)
    assert [(one.entry, len(one.replicates)) for one in board.entries] == [
        ("good", 2),
        ("mid", 1),
        ("poor", 0),
    ]
    assert [cell.value for cell in board.entries[0].cells] == [0.7, 0.7]
    assert [cell.value for cell in board.entries[0].replicates[1].cells] == [0.55, 0.8]
    assert "t/good/replicates/3/helm/open/instances.parquet" in board.inputs


def test_answers_are_means_over_trainings_and_tables_say_how_much_training_is(results: Results) -> None:
    board = scored(results)
    answers = read_answers(competition(), board, results)
    closed = answers["closed", "math"]
    assert closed.columns[0] is not None
    assert closed.columns[0].mean(axis=1).tolist() == pytest.approx([2 / 3, 0.5, 0.1])
    made = analyze_track(competition(), board, results)
    assert made.uncertainty is not None
    assert made.uncertainty.method == "bootstrap"
    assert made.uncertainty.entries[0].mean_score is not None
    assert "| trainings | of it training |" in markdown(board, made)
    assert "## Noise of training (measured)" in analysis_markdown(board, made)


def test_a_replicate_without_a_result_stops_nobody_and_is_a_footnote(results: Results) -> None:
    good = scored(results, failing="good/replicates/2").entries[0]
    assert [one.number for one in good.replicates] == [3]
    assert good.notes == [
        "Training 2 does not count: open, not run: not run yet; run again, or restore the config."
    ]


def test_a_program_that_ignores_its_seed_has_not_trained_again(results: Results) -> None:
    leave_adapter(results.entry("t", "good/replicates/3"), "weights 1")
    good = scored(results).entries[0]
    assert [one.number for one in good.replicates] == [2]
    assert "so the program ignores PALIO_SEED" in good.notes[0]


def test_a_version_by_another_convention_keeps_the_replicates(results: Results) -> None:
    board = scored(results)
    assert rescore(board, competition(), results) == board
    other = rescore(board, competition(), results, convention="helm2023")
    assert [len(one.replicates) for one in other.entries] == [2, 1, 0]


def test_an_analysis_is_the_same_whatever_the_order_of_entries() -> None:
    trainings = {"a": [[0.6, 0.6], [0.5, 0.5]], "b": [[0.5, 0.5], [0.52, 0.4]], "c": [[0.3, 0.3]]}
    turned = dict(reversed(trainings.items()))
    assert analyze(board_of(trainings), replicates=50) == analyze(board_of(turned), replicates=50)


# --- the luck of the selected ----------------------------------------------------------------------------


def test_the_first_of_many_equals_was_lucky_and_a_clear_winner_was_not() -> None:
    draw = np.random.default_rng(0)
    equals = {f"e{number}": [draw.binomial(100, 0.5, size=2) / 100] for number in range(8)}
    (first,) = found(board_of({name: [of[0].tolist()] for name, of in equals.items()})).selections
    assert first.selected_as == "the first of 8 entries"
    assert first.score - first.corrected_score > 0.05
    (clear,) = found(board_of({"a": [[0.9, 0.9]], "b": [[0.5, 0.5]], "c": [[0.1, 0.1]]})).selections
    assert clear.corrected_score == pytest.approx(clear.score, abs=1e-6)


def test_the_best_of_a_teams_entries_counts_as_such() -> None:
    board = board_of({"a1": [[0.6, 0.6]], "a2": [[0.59, 0.59]], "a3": [[0.58, 0.6]], "b": [[0.5, 0.5]]})
    teams = [
        scored.model_copy(update={"team": "A" if scored.entry.startswith("a") else "B"})
        for scored in board.entries
    ]
    made = found(board.model_copy(update={"entries": teams}))
    assert [one.selected_as for one in made.selections] == [
        "the first of 4 entries",
        "the best of 3 entries of A",
    ]
    assert made.selections[1].corrected_score < made.selections[1].score
    assert "is the luck of the selected" in markdown(board, analyze(board, replicates=50))

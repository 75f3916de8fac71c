"""From open to closed: what of a fall is contamination, what is noise, and what is neither."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from palio.neurips2023.tables import REMARK, published_leaderboards
from palio.records import Cell, Column, Contamination, Leaderboard, Overfitting
from palio.scoring.analysis import analyze
from palio.scoring.fall import NO_DATA
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.tables import analysis_markdown
from palio.scoring.uncertainty import AnswersByScenario, ScenarioAnswers

TABLES = Path(os.environ.get("PALIO_SHARED", Path(__file__).parents[3] / "shared")) / "neurips2023"
SCENARIOS = {"open": "mmlu", "closed": "math"}
QUESTIONS = 200
Answers = Mapping[str, dict[str, np.ndarray]]
"""By stage and entry, one 0 or 1 per question."""


def drawn(skills: dict[str, tuple[float, float]], seed: int = 0) -> Answers:
    """Answers by skill: the probability of a right one, open and closed."""
    draw = np.random.default_rng(seed)
    return {
        stage: {name: draw.random(QUESTIONS) < skill[place] for name, skill in skills.items()}
        for place, stage in enumerate(SCENARIOS)
    }


def board_of(answers: Answers) -> tuple[Leaderboard, AnswersByScenario]:
    names = sorted(answers["open"])
    board = score(
        competition="c",
        track="t",
        columns=[Column(stage=stage, scenario=name, metric="EM") for stage, name in SCENARIOS.items()],
        candidates=[
            Candidate(
                name,
                name,
                [Cell(value=float(answers[stage][name].mean()), n=QUESTIONS) for stage in SCENARIOS],
            )
            for name in names
        ],
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
    )
    runs = np.arange(QUESTIONS) * 4 // QUESTIONS
    questions = [(f"run{run}", f"id{number}") for number, run in enumerate(runs)]
    return board, {
        (stage, name): ScenarioAnswers(
            runs,
            [np.stack([answers[stage][entry] for entry in names]).astype(np.float32)],
            questions=questions,
        )
        for stage, name in SCENARIOS.items()
    }


def contamination(entry: str, seen: dict[str, list[str]] | None, count: int) -> Contamination:
    return Contamination(
        competition="c",
        track="t",
        entry=entry,
        ngram=13,
        dataset_sha256="d",
        instances={"open": {"mmlu": QUESTIONS}, "closed": {"math": QUESTIONS}},
        contaminated={"open": {"mmlu": count}, "closed": {"math": 0}},
        open_questions=seen,
    )


def audited(answers: Answers, reports: Mapping[str, Contamination | str] | None = None) -> Overfitting:
    clean = {name: contamination(name, {}, 0) for name in answers["open"]}
    found = analyze(*board_of(answers), {**clean, **(reports or {})}, replicates=400).overfitting
    assert found is not None
    return found


def skills(count: int = 24, *, tuned: float = 0.0) -> dict[str, tuple[float, float]]:
    """Entries of rising skill, every third of which is better on the open stage by `tuned`."""
    found = {}
    for number in range(count):
        skill = 0.35 + 0.3 * number / count
        found[f"e{number:02}"] = (skill + tuned * (number % 3 == 0), skill)
    return found


def test_the_parts_of_every_fall_add_up_to_it() -> None:
    seen = {"run0": [f"id{number}" for number in range(30)]}
    found = audited(drawn(skills(tuned=0.1)), {"e05": contamination("e05", seen, 30), "e06": "no report"})
    for entry in found.entries:
        fall = entry.fall
        assert fall is not None
        assert fall.value == pytest.approx(entry.open_score - entry.closed_score)
        assert (fall.contamination or 0) + fall.noise + fall.rest == pytest.approx(fall.value)
    assert found.shares is not None
    assert sum(found.shares.model_dump().values()) == pytest.approx(1)


def test_falls_of_entries_that_are_equally_good_in_both_stages_are_noise() -> None:
    shares = [audited(drawn(skills(), seed)).shares for seed in range(5)]
    assert np.mean([of.noise for of in shares if of]) > 0.8
    tuned = audited(drawn(skills(tuned=0.3))).shares
    assert tuned is not None
    assert tuned.rest > 0.5, "tuning to the open stage is no noise"


def test_an_entry_that_knew_the_answers_falls_by_its_contamination() -> None:
    """Without the questions that it knew, which nobody is asked then, it has the score it would have had."""
    honest = drawn(skills())
    known = np.arange(QUESTIONS) < 100
    told = {stage: dict(of) for stage, of in honest.items()}
    told["open"]["e03"] = honest["open"]["e03"] | known
    seen = {f"run{run}": [f"id{number}" for number in range(50 * run, 50 * run + 50)] for run in (0, 1)}
    found = audited(told, {"e03": contamination("e03", seen, 100)})
    fall = next(entry.fall for entry in found.entries if entry.entry == "e03")
    assert fall is not None
    assert fall.contamination is not None
    rest_only = {
        stage: {name: np.where(known, 0, of) if stage == "open" else of for name, of in answers.items()}
        for stage, answers in honest.items()
    }
    board, _ = board_of(rest_only)  # ranks by the questions that it did not know
    clean = next(scored.stage_scores["open"] for scored in board.entries if scored.entry == "e03")
    own = next(entry for entry in found.entries if entry.entry == "e03")
    assert fall.contamination == pytest.approx(own.open_score - clean)
    assert fall.contamination > 0.3
    assert found.shares is not None
    assert found.shares.contamination > 0


def test_what_is_not_known_of_contamination_is_part_of_the_rest_and_said() -> None:
    """No report; a report from before it named the questions. A base model as it is has no data to be in."""
    reports: dict[str, Contamination | str] = {
        "e01": "no contamination report yet",
        "e02": contamination("e02", None, 7),
        "e03": NO_DATA,
    }
    found = audited(drawn(skills()), reports)
    of = {entry.entry: entry.fall for entry in found.entries}
    known = [fall.contamination for name in ("e01", "e02", "e03", "e04") if (fall := of[name])]
    assert known == [None, None, 0.0, 0.0]
    assert "The contamination of 2 of 24 entries is not known: it is part of the rest." in found.text


def test_three_entries_say_nothing_about_noise() -> None:
    found = audited(drawn(skills(3)))
    assert [entry.fall for entry in found.entries] == [None] * 3
    assert found.shares is None


def test_the_noise_of_training_is_part_of_the_error_and_its_share_is_told() -> None:
    board, answers = board_of(drawn(skills()))
    with_training = analyze(board, answers, replicates=200, training_noise=0.05)
    questions_only = analyze(board, answers, replicates=200)
    for made, covered in ((with_training, "questions and training"), (questions_only, "questions alone")):
        assert made.overfitting is not None
        assert f"is what the noise of {covered} makes" in made.overfitting.text
    pairs = zip(
        with_training.overfitting.entries,  # type: ignore[union-attr]
        questions_only.overfitting.entries,  # type: ignore[union-attr]
        strict=True,
    )
    for both, alone in pairs:
        assert both.fall is not None
        assert alone.fall is not None
        assert both.fall.standard_error > alone.fall.standard_error
        assert alone.fall.of_questions is None
        assert both.fall.of_questions is not None
        assert both.fall.of_questions < 0.95
    assert "### What the falls are made of" in analysis_markdown(board, with_training)


def test_of_2023s_rounds_noise_explains_little_and_contamination_cannot_be_known() -> None:
    if not TABLES.is_dir():
        pytest.skip(f"the published tables are not at {TABLES}; set PALIO_SHARED")
    (board,) = [one for one in published_leaderboards(TABLES) if one.track == "4090_rounds"]
    found = analyze(board, replicates=200, remark=REMARK).overfitting
    assert found is not None
    assert found.shares is not None
    assert found.shares.noise == pytest.approx(0.16, abs=0.03)
    assert found.shares.contamination == 0
    assert "The contamination of 30 of 30 entries is not known" in found.text
    assert "Without instance values, questions are drawn for every entry on its own" in found.text


def test_a_fall_without_one_question_that_was_not_seen_is_not_known() -> None:
    """A column that nobody is asked says nothing: it is no tie of all."""
    everything = {f"run{run}": [f"id{number}" for number in range(QUESTIONS)] for run in range(4)}
    answers = drawn(skills())
    found = audited(answers, {"e03": contamination("e03", everything, QUESTIONS)})
    fall = next(entry.fall for entry in found.entries if entry.entry == "e03")
    assert fall is not None
    assert fall.contamination is None
    assert fall.contamination_reason == "no question of mmlu is left without those in its data"
    assert "The contamination of 1 of 24 entries is not known" in found.text
    board, values = board_of(answers)
    reports = {"e03": contamination("e03", everything, QUESTIONS), "e04": contamination("e04", None, 7)}
    text = analysis_markdown(board, analyze(board, values, reports, replicates=50))
    assert "not known: no question of mmlu is left without those in its data" in text
    assert "not known: its report does not name the questions" in text
    assert "not known: no contamination report" in text

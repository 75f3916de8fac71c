"""The real competition's config: its budgets are those of 2023, without the mistake of 2023."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palio.config import Competition, Scenario, load_competition, load_entry, parse
from palio.errors import BadInput
from palio.evaluation.helm import budgets, run_entries, shares, stage_entries, stage_runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def competition(monkeypatch: pytest.MonkeyPatch) -> Competition:
    monkeypatch.chdir(ROOT)
    return load_competition(ROOT / "config/neurips2023.yaml")


def asked(descriptions: list[str]) -> list[int]:
    return [int(re.findall(r"max_eval_instances=(\d+)", text)[0]) for text in descriptions]


@given(total=st.integers(0, 2000), parts=st.integers(1, 90))
def test_shares_add_up_and_differ_by_at_most_one(total: int, parts: int) -> None:
    found = shares(total, parts)
    assert sum(found) == total
    assert len(found) == parts
    assert max(found) - min(found) <= 1


@given(groups=st.lists(st.sampled_from("abcde"), min_size=1, max_size=40), questions=st.integers(0, 500))
def test_every_group_gets_the_same_number_of_questions(groups: list[str], questions: int) -> None:
    found = budgets(groups, questions)
    assert sum(found) == questions
    of_group = [
        sum(n for name, n in zip(groups, found, strict=True) if name == group) for group in set(groups)
    ]
    assert max(of_group) - min(of_group) <= 1


def test_the_open_stage_has_the_88_run_entries_less_4_without_test_questions_in_34_groups_of_61(
    competition: Competition,
) -> None:
    scenarios = competition.stages.open.scenarios
    found = [entry for scenario in scenarios.values() for entry in run_entries(ROOT / scenario.run_entries)]
    assert len(found) == 88 - 4
    assert len({group for _, group in found}) == 34
    asked_of = {name: sum(asked(of)) for name, of in stage_entries(stage_runs(competition, "open")).items()}
    assert sum(asked_of.values()) == 34 * 61


def test_the_closed_stage_asks_5000_questions_in_five_scenarios(competition: Competition) -> None:
    entries = stage_entries(stage_runs(competition, "closed"))
    assert {name: sum(asked(of)) for name, of in entries.items()} == dict.fromkeys(entries, 1000)
    assert asked(entries["ethics"]) == [200] * 5
    assert set(asked(entries["MATH"])) == {71, 72}
    assert len(entries["MATH"]) == 14


def test_one_setting_scales_a_stage_and_drops_what_gets_no_question(competition: Competition) -> None:
    stage = competition.stages.open.model_copy(update={"scale": 2 / 61})
    stages = competition.stages.model_copy(update={"open": stage})
    entries = stage_entries(stage_runs(competition.model_copy(update={"stages": stages}), "open"))
    assert asked(entries["MMLU"]) == [1] * 24  # two of each of 12 topics
    assert asked(entries["GSM8K"]) == [2]
    assert sum(asked(entries["BIG-bench"])) == 36


def test_every_question_is_of_the_split_that_is_scored(competition: Competition) -> None:
    entries = stage_entries(stage_runs(competition, "open"))
    for name, of in entries.items():
        split = "valid" if name == "TruthfulQA" else "test"
        assert all(f"eval_split={split}," in entry for entry in of)


def test_ethics_is_one_scenario_of_fifteen_columns_and_summaries_have_five(competition: Competition) -> None:
    closed = competition.stages.closed.scenarios
    assert len(closed["ethics"].metrics) == 15
    assert len({metric.run for metric in closed["ethics"].metrics.values()}) == 5
    for name in ("sam_sum", "CNN-DailyMail"):
        directions = [metric.higher_is_better for metric in closed[name].metrics.values()]
        assert directions == [True, False, False, False, False]


def test_a_scenario_has_one_kind_of_budget() -> None:
    for budget in ({}, {"questions": 3, "max_eval_instances": 3}):
        with pytest.raises(BadInput, match="give either max_eval_instances or questions"):
            parse(Scenario, {"run_entries": "x", "metrics": {"EM": {"metric": "exact_match"}}} | budget, "x")


def test_the_winners_base_models_are_pinned() -> None:
    for path in sorted((ROOT / "config/entries/neurips2023").glob("*.yaml")):
        assert re.fullmatch("[0-9a-f]{40}", load_entry(path).base_model.revision or "")


@pytest.mark.parametrize("name", ["neurips2023", "neurips2023_fair"])
def test_the_competition_plans_from_a_fresh_clone_without_the_teams_data(tmp_path: Path, name: str) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for part in ("Snakefile", "rules", "config", "profiles"):
        (clone / part).symlink_to(ROOT / part)
    python = Path(sys.executable)
    ended = subprocess.run(
        [str(python.with_name("snakemake")), "--configfile", f"config/{name}.yaml", "-n", "--quiet"],
        cwd=clone,
        env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]

"""The rounds of 2023 as configs: from the published values they make the published leaderboards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from palio.config import Competition, load_competition
from palio.neurips2023.tables import Table, read_tables
from palio.records import Cell, Column
from palio.scoring.columns import columns_of
from palio.scoring.leaderboard import Candidate, score

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("PALIO_SHARED", ROOT.parent / "shared")) / "neurips2023"
CONFIGS = {"open": "neurips2023_open", "hidden": "neurips2023_hidden", "final": "neurips2023"}
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no published tables in {SHARED}")


@pytest.fixture(autouse=True)
def _repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def config(name: str) -> Competition:
    return load_competition(ROOT / "config" / f"{name}.yaml")


def published_name(column: Column, round_name: str) -> str:
    """A column of a config, as the published files call it."""
    scenario, metric = column.scenario, column.metric
    if round_name == "open":
        return " - ".join(metric.split(" ", 1))
    if scenario == "ethics":
        return " - ".join(f"ethics_{metric}".split(" ", 1))
    scenario = {"CNN-DailyMail": "CNN/DailyMail", "MATH": "MATH (chain-of-thoughts)"}.get(scenario, scenario)
    return f"{scenario} - {metric}"


def published_scenario(scenario: str) -> str:
    return scenario.replace("CNN-DailyMail", "CNN/DailyMail")


def tables() -> list[Table]:
    return read_tables(SHARED) if SHARED.is_dir() else []


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.path.stem)
def test_the_config_of_a_round_makes_the_published_leaderboard(table: Table) -> None:
    competition = config(CONFIGS[table.round.name])
    columns = columns_of(competition)
    names = [published_name(column, table.round.name) for column in columns]
    assert set(names) == set(table.names)
    assert competition.scoring.convention == table.round.convention

    candidates = [
        Candidate(entry, "team", [Cell(value=cells[name], state=state(cells[name])) for name in names])
        for entry, cells in table.values.items()
    ]
    weights = {"open": competition.stages.open.weight, "closed": competition.stages.closed.weight}
    board = score(
        competition="neurips2023",
        track="t",
        columns=columns,
        candidates=candidates,
        stage_weights=weights,
        convention=competition.scoring.convention,
        final=True,
    )
    checked = 0
    for scored in board.entries:
        published = table.values[scored.entry]
        for means in scored.scenario_win_rates.values():
            for scenario, rate in means.items():
                assert rate == pytest.approx(
                    published[f"{published_scenario(scenario)} Mean Win Rate"], abs=1e-12
                )
                checked += 1
        for name, of in table.round.score_names.items():
            value = scored.final_score if of == "final" else scored.stage_scores[of]
            assert value == pytest.approx(published[name], abs=1e-12)
            checked += 1
    derived = sum(name not in table.names for cells in table.values.values() for name in cells)
    assert checked == derived, "every derived cell was compared"


def state(value: float | None) -> str:
    return "not_run" if value is None else "finished"


def test_what_2023_asked_is_what_the_configs_ask() -> None:
    final = config("neurips2023")
    assert {name: of.questions for name, of in final.stages.closed.scenarios.items()} == dict.fromkeys(
        ("CNN-DailyMail", "sam_sum", "corr2cause", "MATH", "ethics"), 1000
    )
    assert not final.stages.closed.scenarios["CNN-DailyMail"].scored
    assert config("neurips2023_hidden").stages.closed.scenarios["CNN-DailyMail"].scored
    for name in CONFIGS.values():
        stages = config(name).stages
        assert not stages.open.scenarios["CNN-DailyMail"].scored, "asked, and not scored"
        assert not stages.open.cut_at_stop_sequences, "nobody cut"
    opened = config("neurips2023_open").stages.open.scenarios
    by_denominator = {name: opened[name].questions for name in ("TruthfulQA", "GSM8K", "BBQ")}
    assert by_denominator == {"TruthfulQA": 9, "GSM8K": 19, "BBQ": 18}
    assert 590 <= sum(of.questions or 0 for of in opened.values()) <= 610


def test_the_fair_edition_differs_in_the_keys_its_file_names() -> None:
    fair, final = config("neurips2023_fair"), config("neurips2023")
    assert fair.scoring.convention == "midrank"
    assert fair.tracks == final.tracks
    assert all(of.scored and of.shortfall == "refuse" for of in fair.stages.closed.scenarios.values())
    bias = [column for column in columns_of(fair) if column.metric.startswith(("Stereo", "Repres"))]
    assert len(bias) == 12
    assert all(column.missing == "exclude" for column in bias)

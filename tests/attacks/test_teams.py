"""Attacks by names: one team as several, one team as another, another team's folder, ids that look alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from palio.config import RuleSet, load_competition, team_id, team_skeleton
from palio.eligibility.entry_file import check_file, participants
from palio.entries import Entries
from palio.errors import BadInput, RuleViolation
from palio.sandbox.handed_in import take_files
from palio.settings import CheckedAgainst
from tests.support.curation import curate, recipe, write_jsonl
from tests.support.folder import ROOT

SAME = [
    "Nobile Oca",
    "nobile oca",
    "NOBILE OCA",
    "Nobile  Oca",
    "nobile-oca",
    "\uff2eobile Oca",
    "Nobile_Oca.",
]
ALIKE = ["Nobile \u041eca", "Nobil\u0435 Oca", "N\u03bfbile Oca", "Nobile 0ca", "Nobi1e Oca"]


def entry_of(team: str, learning_rate: float = 2e-4) -> dict[str, Any]:
    return {
        "team": team,
        "track": "a100",
        "base_model": {"hub": f"mistralai/Mistral-7B-v0.1@{'0' * 40}"},
        "dataset": {
            "sources": [{"path": "resources/teams/a.jsonl", "licence": "MIT", "url": "https://x.org"}]
        },
        "finetune": {"learning_rate": learning_rate},
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resources/teams").mkdir(parents=True)
    write_jsonl(tmp_path / "resources/teams/a.jsonl", [{"prompt": "a", "completion": "b"}])
    participants.cache_clear()
    return tmp_path


def checked(folder: Path, name: str, rules: Path | None = None) -> list[str]:
    against = CheckedAgainst.of(load_competition(ROOT / "config/neurips2023.yaml"))
    path = str(rules or ROOT / "config/rulesets/neurips2023.yaml")
    found = check_file(folder / f"{name}.yaml", against.model_copy(update={"rules": path}))
    return [f"{one.rule}: {one.why}" for one in (*found.violations, *found.notices)]


@pytest.mark.parametrize("name", SAME)
def test_a_name_written_otherwise_is_the_same_team(name: str) -> None:
    assert team_id(name) == "nobile-oca"


@pytest.mark.parametrize("name", ALIKE)
def test_a_name_that_only_looks_the_same_is_another_team_and_noticed(folder: Path, name: str) -> None:
    assert team_id(name) != "nobile-oca"
    assert team_skeleton(name) == team_skeleton("Nobile Oca")
    (folder / "a.yaml").write_text(yaml.safe_dump(entry_of("Nobile Oca", 1e-4)))
    (folder / "b.yaml").write_text(yaml.safe_dump(entry_of(name)))
    (line,) = checked(folder, "b")
    assert line.startswith("team.name: ")
    assert line.isascii()


def test_a_quota_counts_a_team_however_it_writes_its_name(folder: Path) -> None:
    for number, name in enumerate(SAME[:4]):
        (folder / f"e{number}.yaml").write_text(yaml.safe_dump(entry_of(name, 10.0 ** -(number + 3))))
    assert any(line.startswith("team.entries: ") for line in checked(folder, "e0"))


@pytest.mark.parametrize("name", ["...", "\u200b", "  ", "-_-"])
def test_a_name_without_letters_is_no_team(folder: Path, name: str) -> None:
    (folder / "a.yaml").write_text(yaml.safe_dump(entry_of(name)))
    assert checked(folder, "a")[0].startswith("schema.value: ")


def test_ids_that_differ_by_case_are_one_id(folder: Path) -> None:
    for name in ("Acme", "acme", "other"):
        (folder / "resources" / f"{name}.yaml").write_text(yaml.safe_dump(entry_of(name)))
    competition = load_competition(ROOT / "config/neurips2023.yaml")
    entries = Entries(
        competition.model_copy(update={"entries": ("resources",), "withdrawn": {}, "shards": {}})
    )
    assert sorted(entries) == ["Acme", "other"]
    assert "is taken by" in str(entries.left_out[0])


@pytest.fixture
def own_folders(folder: Path) -> Path:
    """A rule set that gives each team its own folder."""
    content = yaml.safe_load((ROOT / "config/rulesets/neurips2023.yaml").read_text())
    content["team_folders"] = ["resources/teams/<team>"]
    (folder / "rules.yaml").write_text(yaml.safe_dump(content))
    return folder / "rules.yaml"


def test_another_teams_folder_is_refused_as_a_source(folder: Path, own_folders: Path) -> None:
    theirs = write_jsonl(folder / "resources/teams/victim/a.jsonl", [{"prompt": "a", "completion": "b"}])
    entry = entry_of("Acme")
    entry["dataset"]["sources"][0]["path"] = "resources/teams/victim/a.jsonl"
    (folder / "a.yaml").write_text(yaml.safe_dump(entry))
    (line,) = checked(folder, "a", own_folders)
    assert "victim/a.jsonl does not lie in resources/teams/acme" in line
    rules = RuleSet.model_validate(yaml.safe_load(own_folders.read_text()))
    with pytest.raises(RuleViolation, match="does not lie in resources/teams/acme"):
        curate(
            recipe([{"path": str(theirs)}]),
            folder / "dataset",
            team_folders=[Path(one) for one in rules.folders_of("Acme")],
        )


@pytest.mark.parametrize("name", ["../victim", "victim/..", "<team>"])
def test_a_teams_name_leads_to_no_other_folder(name: str) -> None:
    assert set(team_id(name)) <= set("victim-team")


# --- programs ----------------------------------------------------------------------------------------------


def test_a_program_changed_after_it_was_taken_is_not_what_runs(folder: Path) -> None:
    theirs = folder / "resources/teams/acme"
    theirs.mkdir()
    (theirs / "main.py").write_text("print('checked')")
    copy = take_files(
        "resources/teams/acme", "command.files", folder / "copy", roots=["resources/teams"], limit=1 << 20
    )
    (theirs / "main.py").write_text("print('swapped')")
    assert (copy / "main.py").read_text() == "print('checked')"


@pytest.mark.parametrize("swapped", ["acme", "acme/program"])
def test_a_programs_folder_that_becomes_a_link_is_refused(folder: Path, swapped: str) -> None:
    for name in ("acme", "victim"):
        (folder / "resources/teams" / name / "program").mkdir(parents=True)
        (folder / "resources/teams" / name / "program/main.py").write_text(name)
    place = folder / "resources/teams" / swapped
    place.rename(folder / "before")
    place.symlink_to(folder / "resources/teams/victim")
    with pytest.raises(RuleViolation, match=f"resources/teams/{swapped} is a symbolic link"):
        take_files(
            "resources/teams/acme/program",
            "command.files",
            folder / "copy",
            roots=["resources/teams"],
            limit=1,
        )


def test_a_programs_folder_has_a_size_and_its_scripts_stay_scripts(folder: Path) -> None:
    theirs = folder / "resources/teams/acme"
    theirs.mkdir()
    (theirs / "run.sh").write_text("true")
    (theirs / "run.sh").chmod(0o700)
    copy = take_files(str(theirs), "command.files", folder / "copy", roots=[], limit=1 << 20)
    assert (copy / "run.sh").stat().st_mode & 0o777 == 0o755
    with (theirs / "sparse").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(RuleViolation, match="more than the 0 allowed"):
        take_files(str(theirs), "command.files", folder / "copy", roots=[], limit=1 << 20)


def test_an_image_that_is_a_link_is_refused(folder: Path) -> None:
    (folder / "resources/teams/a.sif").symlink_to("/etc/passwd")
    with pytest.raises(RuleViolation, match=r"a\.sif is a symbolic link"):
        take_files(
            "resources/teams/a.sif",
            "server.image",
            folder / "image.sif",
            roots=["resources/teams"],
            limit=1 << 20,
        )
    with pytest.raises(BadInput, match="no such file or folder"):
        take_files("resources/teams/b.sif", "server.image", folder / "b", roots=["resources/teams"], limit=1)

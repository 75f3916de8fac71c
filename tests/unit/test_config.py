"""A wrong config stops with one line that names file, key, value and fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from palio.config import (
    BaseModelSource,
    Competition,
    Entry,
    FinetuneRecipe,
    faults,
    load_competition,
    load_entry,
    load_rules,
    parse,
    read_yaml,
)
from palio.entries import BrokenEntry, Entries
from palio.errors import BadInput

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "config" / "config.yaml"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    content: dict[str, Any] = yaml.safe_load(DEMO.read_text())
    return content


@pytest.fixture
def curated() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "config/entries/demo/curated.yaml").read_text())
    return content


@pytest.mark.parametrize(
    "name", ["config/config.yaml", "config/neurips2023.yaml"], ids=["demo", "neurips2023"]
)
def test_every_competition_in_the_repository_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    competition = load_competition(ROOT / name)
    load_rules(ROOT / competition.rules)
    for path in Entries(competition).files.values():
        load_entry(path)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("titel",), "x", "config: titel is 'x': unknown key; did you mean title?"),
        (("tracks", "laptop", "ram_gb"), "much", "config: tracks.laptop.ram_gb is 'much'"),
        (("tracks", "laptop", "training_budget"), 600, "give a duration with its unit"),
        (("stages", "open", "weight"), "1/2", "make them add up to 1"),
        (("stages", "open", "scenarios", "pattern_match", "metrics"), {}, "at least 1 item"),
        (("scoring",), {"convention": "alphabet"}, "config: scoring.convention is 'alphabet'"),
        (("tracks", "a b"), {"title": "x", "ram_gb": 1, "training_budget": "1h"}, "use letters, digits"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_fix(
    demo: dict[str, Any], path: tuple[str, ...], value: object, line: str
) -> None:
    at = demo
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(BadInput) as error:
        load_competition(demo)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(demo: dict[str, Any]) -> None:
    del demo["tracks"]["laptop"]["training_budget"]
    with pytest.raises(BadInput, match=r"config: tracks\.laptop\.training_budget: is missing; add it"):
        load_competition(demo)


def test_a_closed_store_inside_the_repository_is_refused_outside_the_demo(demo: dict[str, Any]) -> None:
    demo["demo"] = False
    with pytest.raises(BadInput, match="closed_store is 'private': give a folder outside the repository"):
        load_competition(demo)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"finetune": {"learning_rate": -1}}, "finetune.learning_rate is -1"),
        ({"finetune": {"learning_rat": 1}}, "did you mean learning_rate?"),
        ({"finetune": None}, "give both dataset and finetune, or neither"),
        ({"base_model": {}}, "give exactly one of hub, path, gguf"),
        ({"base_model": {"hub": "a/b@c", "path": "x"}}, "give exactly one of hub, path, gguf"),
        ({"base_model": {"hub": "just-a-name"}}, "write hub as org/name@revision"),
        ({"team": ""}, "team is ''"),
        ({"track": 3}, "track is 3"),
    ],
)
def test_a_wrong_entry_is_named_with_its_key(
    curated: dict[str, Any], change: dict[str, Any], line: str
) -> None:
    with pytest.raises(BadInput) as error:
        parse(Entry, curated | change, "acme.yaml")
    assert str(error.value).startswith("acme.yaml")
    assert line in str(error.value)


FILES = {"run": "python train.py", "files": "f"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"kind": "command"}, "kind command has no section finetune; remove it, or correct the kind"),
        ({"command": FILES}, "kind recipe has no section command"),
        ({"kind": "command", "finetune": None}, "kind command needs the section command; add it"),
        ({"kind": "server", "dataset": None, "finetune": None}, "kind server needs the section server"),
        (
            {"kind": "command", "finetune": None, "command": {"run": "x"}},
            "command: give files, image, or both",
        ),
        (
            {"kind": "command", "finetune": None, "command": {"run": "x", "image": "docker://a/b:latest"}},
            "write image as docker://name@sha256:<64 hex digits>",
        ),
        (
            {"kind": "command", "finetune": None, "command": FILES | {"fils": "x"}},
            "command.fils is 'x': unknown key; did you mean files?",
        ),
        (
            {"kind": "command", "finetune": None, "command": FILES | {"contract": 2}},
            "command.contract is 2",
        ),
    ],
)
def test_an_entry_has_the_sections_of_its_kind(
    curated: dict[str, Any], change: dict[str, Any], line: str
) -> None:
    with pytest.raises(BadInput) as error:
        parse(Entry, curated | change, "acme.yaml")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_the_kind_is_recipe_unless_it_is_said(curated: dict[str, Any]) -> None:
    entry = parse(Entry, curated, "acme.yaml")
    assert entry.kind == "recipe"
    assert entry.programs == {}


def test_an_unknown_operation_is_answered_with_the_known_ones(curated: dict[str, Any]) -> None:
    curated["dataset"]["operations"] = [{"op": "polish"}]
    with pytest.raises(BadInput, match=r"unknown operation; use one of .*drop_exact_duplicates"):
        parse(Entry, curated, "acme.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("team: a\nteam: b\n", "key 'team' is duplicated"),
        ("team: [", "is not YAML"),
        ("- a\n- b\n", "is not a section"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "acme.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=line) as error:
        load_entry(file)
    assert "\n" not in str(error.value)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "acme.yaml"
    file.write_bytes("team: Contrada dell'Oca è qui".encode("latin-1"))
    with pytest.raises(BadInput, match="save it as UTF-8"):
        load_entry(file)


def competition_with(folders: tuple[str, ...], demo: dict[str, Any]) -> Competition:
    return load_competition(demo | {"entries": list(folders)})


@pytest.mark.parametrize("name", ["two words.yaml", "ümlaut.yaml", "acme.yml", "-acme.yaml"])
def test_a_file_name_that_is_not_an_id_is_left_out(tmp_path: Path, demo: dict[str, Any], name: str) -> None:
    for file in (name, "acme.yaml"):
        (tmp_path / file).write_text("team: x\n")
    entries = Entries(competition_with((str(tmp_path),), demo))
    assert list(entries) == ["acme"]
    (fault,) = entries.left_out
    assert "rename it to <id>" in str(fault)


def test_an_id_that_is_taken_is_left_out(tmp_path: Path, demo: dict[str, Any]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "acme.yaml").write_text("team: x\n")
    entries = Entries(competition_with((str(tmp_path / "a"), str(tmp_path / "b")), demo))
    assert entries.files == {"acme": tmp_path / "a/acme.yaml"}
    assert "'acme': is taken by" in str(entries.left_out[0])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("team: Oca\ntrack: far\nfine_tune: {}", ("far", "Oca")),
        ("team: Oca\ntrack: far\nbase_model: {path: 3}", ("far", "Oca")),
        ("team: [a\ntrack: far", ("near", "unknown")),
        ("- team: Oca\n- track: far", ("near", "unknown")),
        ("team: Oca\ntrack: nowhere", ("near", "Oca")),
        ("team: {a: b}\ntrack: far", ("far", "unknown")),
        ('team: "O\\u202eca"\ntrack: far', ("far", "unknown")),
        ("team: Oca\ntrack: [far]", ("near", "Oca")),
        ("team: Oca", ("near", "Oca")),
        ("", ("near", "unknown")),
    ],
)
def test_an_invalid_entry_is_shown_under_the_team_and_track_that_it_names_if_those_are_valid(
    tmp_path: Path, demo: dict[str, Any], text: str, shown: tuple[str, str]
) -> None:
    (tmp_path / "acme.yaml").write_text(text)
    (track,) = demo["tracks"].values()
    competition = load_competition(
        demo | {"tracks": {"near": track, "far": track}, "entries": [str(tmp_path)]}
    )
    broken = Entries(competition)["acme"]
    assert isinstance(broken, BrokenEntry)
    assert (broken.track, broken.team) == shown


def test_a_missing_folder_and_an_entry_that_there_is_not_are_named(demo: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="entries is 'nowhere': no such folder"):
        Entries(competition_with(("nowhere",), demo))
    with pytest.raises(BadInput, match=r"withdrawn\.ghost: no entry has this id"):
        Entries(load_competition(demo | {"withdrawn": {"ghost": "?"}}))
    with pytest.raises(BadInput, match=r"shards\.ghost: no entry has this id"):
        Entries(load_competition(demo | {"shards": {"ghost": 2}}))


def test_base_models_of_different_revisions_have_different_ids() -> None:
    ids = {BaseModelSource(hub=f"org/name@{digit * 40}").id for digit in "0123"}
    assert len(ids) == 4
    assert all(name.startswith("org-name-") for name in ids)


def test_a_competition_that_extends_another_says_only_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = read_yaml(ROOT / "config/config.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    scenario = next(iter(base["stages"]["open"]["scenarios"]))
    content = {
        "extends": "base.yaml",
        "title": "Another",
        "stages": {"open": {"weight": 0, "scenarios": {scenario: None}}, "closed": {"weight": 1}},
    }
    made = load_competition(content)
    assert made.title == "Another"
    assert made.tracks == load_competition(base).tracks
    assert set(made.stages.open.scenarios) == set(base["stages"]["open"]["scenarios"]) - {scenario}
    assert made.stage_weights == {"closed": 1}
    with pytest.raises(BadInput, match=r"extends is .nowhere\.yaml.: no such file"):
        load_competition({"extends": "nowhere.yaml"})
    (tmp_path / "loop.yaml").write_text('{"extends": "loop.yaml"}')
    with pytest.raises(BadInput, match="extends itself"):
        load_competition(tmp_path / "loop.yaml")


@pytest.mark.parametrize("value", [1.5, -1, "many", True, float("inf"), [8], None])
def test_rows_held_out_are_a_number_or_a_share_and_anything_else_is_one_fault(value: Any) -> None:
    (fault,) = faults(FinetuneRecipe, {"validation_rows": value})
    assert fault.key == "validation_rows"
    assert fault.why == "is neither a number of rows nor a share of them"
    assert fault.fix == "give a whole number, such as 200, or a share below 1, such as 0.05"
    for good in (0, 200, 0.05):
        assert faults(FinetuneRecipe, {"validation_rows": good}) == []

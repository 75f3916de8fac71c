"""Nothing that an entry, its team or a reader of the results can see holds a text of the closed stage."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from palio.errors import BadInput, Crashed, State
from palio.evaluation.stage import fetch_data, prepare_stage
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

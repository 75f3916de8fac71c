"""A finished entry can be trained again from its manifest, and what differs is measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from palio import steps
from palio.config import Scenario
from palio.errors import BadInput
from palio.evaluation.stage import prepare_stage
from palio.layout import STAGES, EntryFolder, HelmFolder, Stage
from palio.operating import reproduction
from palio.operating.reproduction import Reproduction, reproduce, score_differences, weight_distance
from palio.provenance import folder_sha256
from palio.records import AdapterManifest, PackageManifest, StageRecord, read_record
from palio.records.tables import INSTANCES_SCHEMA
from palio.settings import EvaluateSettings, RunOptions
from palio.workflow import Workflow
from tests.support.training import Entry, copy_rows, tiny_base_model

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    """A project with one trained entry, `t/e`, in track t of a competition like the demo's."""

    path: Path
    entry: Entry

    @property
    def workflow(self) -> Workflow:
        return Workflow(Path("config/config.yaml"))

    def reproduce(self, *stages: Stage, out: str = "again") -> tuple[Reproduction, EntryFolder]:
        return reproduce(self.workflow, self.entry.folder, Path(out), stages=stages, threads=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Iterator[Finished]:
    path = tmp_path_factory.mktemp("project")
    base = tiny_base_model(path / "resources/base_models/tiny", base_model)
    shutil.copytree(ROOT / "config", path / "config")
    config = path / "config/config.yaml"
    content = yaml.safe_load(config.read_text())
    content["tracks"] = {"t": content["tracks"]["laptop"]}
    content["stages"]["open"]["unanswered"] = "wrong"
    content["stages"]["closed"]["cut_at_stop_sequences"] = False
    for stage in content["stages"].values():
        (name, scenario), *_ = stage["scenarios"].items()
        stage["scenarios"] = {name: scenario | {"max_eval_instances": 2}}
    config.write_text(yaml.safe_dump(content))
    entry = Entry.create(path / "results/t/e", base)
    entry.finetune(max_steps=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield Finished(path, entry)


def test_training_again_on_a_cpu_gives_the_same_bytes(finished: Finished) -> None:
    before = folder_sha256(finished.entry.folder)
    again, _ = finished.reproduce()
    assert again.identical
    assert again.weight_distance == again.loss_difference == 0
    assert folder_sha256(finished.entry.folder) == before


def test_an_adapter_that_was_trained_otherwise_is_told_apart(finished: Finished, tmp_path: Path) -> None:
    other = Entry.create(tmp_path / "other", finished.entry.base)
    other.finetune(max_steps=5, seed=1)
    assert (weight_distance(finished.entry.at.adapter, other.at.adapter) or 0) > 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda adapters: shutil.copytree(adapters / "words", adapters / "numbers"),
        lambda adapters: (adapters / "words").rename(adapters / "numbers"),
        lambda adapters: save_weights(adapters, a=[1.0, 2.0], b=[1e-9]),
        lambda adapters: save_weights(adapters, b=[1.0, 2.0]),
        lambda adapters: save_weights(adapters, a=[1.0]),
    ],
    ids=["an adapter more", "another adapter", "a weight more", "another weight", "another shape"],
)
def test_other_weights_are_no_reproduction_however_small_they_are(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        save_weights(tmp_path / name, a=[1.0, 2.0])
    assert weight_distance(tmp_path / "first", tmp_path / "second") == 0
    change(tmp_path / "second")
    for pair in ("first", "second"), ("second", "first"):
        assert weight_distance(*(tmp_path / name for name in pair)) is None
    same = dict.fromkeys(("first_fingerprint", "second_fingerprint"), "0")
    other = {"identical": False, "weight_distance": None, "loss_difference": 0}
    made = Reproduction(track="t", entry="e", **same, **other)
    assert not made.reproduced
    assert made.lines() == ["adapter: not the same weights by name and shape"]


def save_weights(adapters: Path, **weights: list[float]) -> None:
    (adapters / "words").mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.tensor(values) for name, values in weights.items()}
    save_file(tensors, adapters / "words" / "adapter_model.safetensors")


def test_another_dataset_is_refused(finished: Finished) -> None:
    copy = Entry.create(finished.path / "results/t/copy", finished.entry.base)
    copy.finetune(max_steps=2)
    copy.write_rows(copy_rows(10))
    with pytest.raises(BadInput, match=r"adapter\.json: dataset_sha256.*bring back"):
        reproduce(finished.workflow, copy.folder, Path("again"), stages=(), threads=1)


def test_the_entrys_own_results_are_refused(finished: Finished) -> None:
    with pytest.raises(BadInput, match="own results folder; give another"):
        finished.reproduce(out="results")


def test_the_verb_ends_with_its_verdict(finished: Finished) -> None:
    command = [sys.executable, "-m", "palio.cli", "reproduce", str(finished.entry.folder), "--threads", "1"]
    done = subprocess.run([*command, "--out", "verb"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "adapter: identical\nreproduced\n"), done.stderr
    assert json.loads(Path("verb/t/e/reproduction.json").read_text())["identical"]


def test_both_stages_of_an_identical_package_are_really_asked_under_the_competitions_limits(
    finished: Finished,
) -> None:
    """The winner's own HELM runs are there, of the same package: the reproduction uses none of them."""
    workflow = finished.workflow
    for stage, runs in workflow.stage_runs.items():
        prepare_stage(runs, workflow.resources.stage_record(stage))
    first = EntryFolder.at(finished.entry.folder, workflow.competition.store)
    finished.entry.package()
    options = RunOptions(threads=1)
    for stage, runs in workflow.stage_runs.items():
        settings = EvaluateSettings.of_package(workflow.competition, runs, "t")
        steps.run(stage, first, settings, options)
    made, again = finished.reproduce("open", "closed", out="asked")
    packages = [read_record(PackageManifest, folder.package_manifest) for folder in (first, again)]
    assert packages[0].fingerprint == packages[1].fingerprint
    assert made.reproduced
    assert [score.stage for score in made.scores] == ["open", "closed"]
    for stage in STAGES:
        journals = [
            set(folder.helm_runs(stage).glob(f"*/{HelmFolder.journal.name}")) for folder in (first, again)
        ]
        assert len(journals[0]) == len(journals[1]) == 1
        assert journals[0] != journals[1]
        records = [read_record(StageRecord, folder.stage_record(stage)) for folder in (first, again)]
        # The tables hold log-probabilities, whose last digits depend on what else was in a batch;
        # the first package came by hand, so its record differs in what it was made of.
        tables = {"metrics_sha256", "instances_table_sha256", "made"}
        assert records[0].model_dump(exclude=tables) == records[1].model_dump(exclude=tables)
    open_record, closed_record = (read_record(StageRecord, again.stage_record(stage)) for stage in STAGES)
    assert open_record.unanswered == "wrong"
    assert not closed_record.cut_at_stop_sequences


def test_a_models_own_code_is_confined_as_the_competition_says(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = EntryFolder.at(Path(shutil.copytree(finished.entry.folder, finished.path / "results/t/own")))
    manifest = read_record(AdapterManifest, copy.adapter_manifest)
    manifest.model_copy(update={"code": "0" * 64}).write(copy.adapter_manifest)
    given: dict[str, Any] = {}
    monkeypatch.setattr(steps, "run", lambda step, folder, settings, options: given.update({step: settings}))
    same = dict.fromkeys(("first_fingerprint", "second_fingerprint"), "0")
    made = Reproduction(track="t", entry="own", identical=True, weight_distance=0, loss_difference=0, **same)
    monkeypatch.setattr(reproduction, "_compared", lambda *folders: made)
    monkeypatch.setattr(reproduction, "score_differences", lambda *given: [])
    reproduce(finished.workflow, copy.path, Path("own"), stages=("open",), threads=1)
    isolation = finished.workflow.competition.isolation
    assert given["finetune"].isolation == given["open"].isolation == isolation


SCENARIO = Scenario.model_validate(
    {
        "run_entries": "x.conf",
        "max_eval_instances": 10,
        "metrics": {
            "EM": {"metric": "exact_match"},
            "robust": {"metric": "em", "perturbation": "robustness"},
        },
    }
)


def write_scores(folder: Path, values: Sequence[float]) -> EntryFolder:
    rows = [
        {
            **dict.fromkeys(("competition", "track", "entry"), "x"),
            **{"stage": "open", "scenario": "s", "run": "r", "instance": f"id{number}"},
            **{"metric": "exact_match", "split": "test", "perturbation": None, "value": value},
        }
        for number, value in enumerate(values)
    ]
    (folder / "helm" / "open").mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows, INSTANCES_SCHEMA), folder / "helm" / "open" / "instances.parquet"
    )
    return EntryFolder.at(folder)


def test_answers_that_flip_both_ways_are_noise_and_those_that_flip_one_way_are_not(tmp_path: Path) -> None:
    first = write_scores(tmp_path / "first", [1, 0] * 20)
    both_ways = write_scores(tmp_path / "both", [0, 1, 0, 1, *[1, 0] * 18])
    one_way = write_scores(tmp_path / "one", [1, 1] * 6 + [1, 0] * 14)
    (same,) = score_differences(first, first, "open", {"s": SCENARIO})
    assert (same.first, same.second, same.n, same.noise) == (0.5, 0.5, 40, 0)
    (noise,) = score_differences(first, both_ways, "open", {"s": SCENARIO})
    assert noise.within_noise
    assert noise.noise == pytest.approx(2 * (4 / 39 / 40) ** 0.5)  # four flips of 40
    (better,) = score_differences(first, one_way, "open", {"s": SCENARIO})
    assert (better.second, better.within_noise) == (0.65, False)

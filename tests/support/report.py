"""A finished competition at reduced scale, without models: data, records and telemetry as in `results/`."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from palio.config import Competition, Prizes, load_competition, load_entry
from palio.demo.data import write_demo_sources
from palio.errors import State
from palio.layout import Boards, Results
from palio.provenance import file_sha256, write_json
from palio.records import (
    AdapterManifest,
    Contamination,
    FinetuneRun,
    HelmRun,
    PackageManifest,
    RunFacts,
    StageRecord,
    StageRun,
    StepFailure,
    TrainingFacts,
)
from palio.records.tables import INSTANCES_SCHEMA, METRICS_SCHEMA
from palio.scoring.analysis import analyze_track
from palio.scoring.decision_document import decide_track
from palio.scoring.leaderboard import score_track
from palio.scoring.tables import write_leaderboard
from palio.training.telemetry import SCHEMA as TELEMETRY_SCHEMA
from tests.support.curation import curate, recipe

FAMILIES = ("pattern_match", "variable_substitution", "parity", "natural_reasoning")
SCENARIOS = {"open": FAMILIES[:2], "closed": FAMILIES[2:]}
QUESTIONS = 40
RIGHT: dict[str, dict[str, list[int]]] = {
    "curated": {"open": [30, 25], "closed": [28, 20]},
    "open_only": {"open": [30, 27], "closed": [6, 12]},
    "raw": {"open": [20, 14], "closed": [16, 15]},
    "untuned": {"open": [3, 0], "closed": [0, 9]},
}
"""Of QUESTIONS, by entry, stage and scenario. A tie that conventions break differently is among them."""
HOSTILE = "<script>console.error('ran')</script><img src='http://203.0.113.1/x' onerror='console.error(1)'>"
"""The title of `raw`: an entry's texts are shown, never run."""
CLEANING = ("clean_markup", "drop_refusals", "drop_disagreement", "drop_exact_duplicates")
RECIPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "curated": (FAMILIES, CLEANING),
    "open_only": (FAMILIES[:2], CLEANING),
    "raw": (FAMILIES, ()),
}
"""Sources and operations, by entry; `untuned` has none."""


def write_competition(folder: Path) -> Competition:
    """config/ and results/ of four entries, all finished; `broken` fails its check and is withdrawn."""
    write_demo_sources(folder / "sources", seed=7)
    write_entries(folder, [*RIGHT, "broken"], RECIPES)
    for name in RIGHT:
        leave_entry(folder, name)
    failure = StepFailure(
        step="check",
        state=State.RULE_VIOLATION,
        reason="base_model: acme/secret is not approved",
        log="check.log",
    )
    failure.write(folder / "results/laptop/broken/work/failures/check.json")
    return competition(folder)


def write_entries(folder: Path, names: Iterable[str], trained: Container[str] = ()) -> None:
    (folder / "entries").mkdir(exist_ok=True)
    for name in names:
        content: dict[str, Any] = {
            "team": f"Contrada of {name}",
            "track": "laptop",
            "title": HOSTILE if name == "raw" else f"The entry {name}",
            "base_model": {"path": "/models/base"},
        }
        if name in trained:
            sources = [
                {"path": str(folder / f"sources/{one}.jsonl"), "licence": "CC0-1.0"}
                for one in RECIPES.get(name, RECIPES["raw"])[0]
            ]
            content |= {"dataset": {"sources": sources}, "finetune": {}}
        (folder / f"entries/{name}.yaml").write_text(yaml.safe_dump(content))


def competition(folder: Path, **changes: Any) -> Competition:
    return load_competition(competition_content(folder, **changes))


def competition_content(folder: Path, **changes: Any) -> dict[str, Any]:
    def stage(name: str, weight: str) -> dict[str, Any]:
        scenarios = {
            one: {
                "run_entries": "x.conf",
                "max_eval_instances": QUESTIONS,
                "metrics": {"exact match": {"metric": "em", "higher_is_better": True}},
            }
            for one in SCENARIOS[name]
        }
        return {"title": name, "weight": weight, "time_limit": "10m", "margin": "5m", "scenarios": scenarios}

    track = {"title": "Laptop CPU", "ram_gb": 6, "training_budget": "10m", "training_margin": "10m"}
    content = {
        "competition": "demo",
        "title": "Palio of the tests",
        "entries": [str(folder / "entries")],
        "rules": "rules.yaml",
        "closed_store": "~/closed",
        "withdrawn": {"broken": "its base model is not approved"},
        "tracks": {"laptop": track},
        "stages": {"open": stage("open", "1/3"), "closed": stage("closed", "2/3")},
    }
    return content | changes


def leave_entry(folder: Path, name: str, *, trained: bool = True) -> None:
    """What check, curate, finetune, package and both stages leave of one entry.

    Without `trained` it is a base model as it is.
    """
    trained = trained and name in RECIPES
    at = folder / "results/laptop" / name
    where = {"competition": "demo", "track": "laptop", "entry": name}
    write_json(at / "check.json", {})
    if trained:
        families, operations = RECIPES[name]
        given = recipe(
            [{"path": str(folder / f"sources/{one}.jsonl")} for one in families], *operations, seed=1
        )
        dataset = curate(given, at / "dataset")
        _leave_training(at, where, dataset.sha256, dataset.rows, seconds=18.0 * len(families))
        scenarios = {stage: dict.fromkeys(names, QUESTIONS) for stage, names in SCENARIOS.items()}
        seen = {
            stage: {one: 2 if one == families[0] else 0 for one in names}
            for stage, names in SCENARIOS.items()
        }
        Contamination(
            **where, ngram=13, dataset_sha256=dataset.sha256, instances=scenarios, contaminated=seen
        ).write(at / "contamination.json")
    PackageManifest(
        **where,
        base_model="base",
        base_model_fingerprint="b" * 64,
        adapter_fingerprint="a" * 64 if trained else None,
        dtype="float32",
        parameters=134_515_008,
        max_logit_difference=8e-5 if trained else None,
        files={"model.safetensors": name},
    ).write(at / "package.json")
    RunFacts(seconds=9.5, started="2026-01-01T00:00:00Z", host="node").write(at / "package.run.json")
    for stage in SCENARIOS:
        leave_stage(at, where | {"stage": stage}, RIGHT.get(name, RIGHT["raw"])[stage])


def _leave_training(
    at: Path, where: dict[str, str], dataset: str, rows: int, *, seconds: float, steps: int = 40
) -> None:
    AdapterManifest(
        **where,
        fingerprint="a" * 64,
        recipe_version="1",
        base_model="base",
        base_model_fingerprint="b" * 64,
        dataset_sha256=dataset,
        recipe={"method": "lora", "learning_rate": 1e-3, "lora_r": 16, "target_modules": "all-linear"},
        state="finished",
        steps=steps,
        planned_steps=steps,
        rows=rows,
        rows_too_long=0,
        final_loss=0.41,
        files={},
    ).write(at / "adapter.json")
    telemetry = [
        {
            "step": step,
            "loss": 2.2 * math.exp(-step / 12) + 0.35 + 0.06 * math.sin(2.6 * step),
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 150.0,
            "elapsed_seconds": 1.8 * step,
            "memory_bytes": 1_900_000_000,
            "validation_loss": 2.2 * math.exp(-step / 12) + 0.42 if step % 10 == 0 else None,
        }
        for step in range(1, steps + 1)
    ]
    pq.write_table(pa.Table.from_pylist(telemetry, TELEMETRY_SCHEMA), at / "train.parquet")
    training = TrainingFacts(
        training_seconds=seconds,
        energy_joules=None,
        memory_cap_gb=None,
        device="cpu",
        threads=1,
        peak_memory_bytes=1_900_000_000,
    )
    FinetuneRun(seconds=81.0, training=training).write(at / "finetune.run.json")


def leave_stage(at: Path, where: dict[str, str], right: list[int]) -> None:
    """One HELM run per scenario, of which so many questions are right."""
    stage = where["stage"]
    statistic = {"metric": "em", "split": "test", "perturbation": None}
    rows, answers = [], []
    for scenario, count in zip(SCENARIOS[stage], right, strict=True):
        here = where | {"scenario": scenario, "run": f"{scenario}:"} | statistic
        rows.append(here | {"value": count / QUESTIONS, "n": QUESTIONS})
        answers += [here | {"instance": f"id{i}", "value": float(i < count)} for i in range(QUESTIONS)]
    tables = at / "helm" / stage
    tables.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, METRICS_SCHEMA), tables / "metrics.parquet")
    pq.write_table(pa.Table.from_pylist(answers, INSTANCES_SCHEMA), tables / "instances.parquet")
    StageRecord(
        **where,
        package_fingerprint="p",
        instances_sha256="i",
        helm_version="0.5.16",
        state=State.FINISHED,
        runs=[
            HelmRun(
                scenario=one, run=f"{one}:", state=State.FINISHED, instances=QUESTIONS, answered=QUESTIONS
            )
            for one in SCENARIOS[stage]
        ],
        metrics_sha256=file_sha256(tables / "metrics.parquet"),
        instances_table_sha256=file_sha256(tables / "instances.parquet"),
    ).write(at / f"{stage}.json")
    run = StageRun(seconds=130.0, used_seconds=118.5, limit_seconds=600, requests=80)
    run.write(at / f"{stage}.run.json")


def score_competition(
    folder: Path, given: Competition, *, final: bool = True, prizes: Prizes | None = None
) -> Path:
    """Leaderboard, analysis and decision of the track, by the project's own functions; their folder."""
    entries = {path.stem: load_entry(path) for path in sorted((folder / "entries").glob("*.yaml"))}
    results = folder / "results"
    board = score_track(given, "laptop", Results(results), entries, final=final)
    out = results / ("leaderboard" if final else "standings")
    write_leaderboard(board, Boards(out), analyze_track(given, board, Results(results)))
    if prizes:
        assert list(decide_track(given, board, Results(results), prizes, Boards(out)))
    return out

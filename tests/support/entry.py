"""An entry's folder with a package, and a toy server for it, for tests of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palio.config import Probe, Track
from palio.evaluation.evaluate import StartServer, evaluate
from palio.evaluation.helm import run_entries
from palio.evaluation.window import Window
from palio.layout import EntryFolder
from palio.provenance import fingerprint
from palio.records import Contained, PackageManifest, StageRecord
from palio.settings import EvaluateSettings, ScenarioRuns, StageLimits, StageRuns
from tests.support.toy import Toy, serving

UNPROBED = Probe(**dict.fromkeys(Probe.model_fields, "skip"))


def scenario(path: Path, *descriptions: str, instances: int) -> ScenarioRuns:
    """A scenario of HELM runs; writes their run-entries file to `path`."""
    lines = "\n".join(f'{{description: "{description}", priority: 1}}' for description in descriptions)
    path.write_text(f"entries: [\n{lines}\n]\n")
    return ScenarioRuns(
        run_entries=str(path), max_eval_instances=instances, sha256=fingerprint(run_entries(path))
    )


def packaged_entry(folder: Path, name: str = "acme") -> Path:
    """An entry's folder with a package's manifest."""
    entry_dir = folder / "results" / "laptop" / name
    package = PackageManifest(
        competition="test",
        track="laptop",
        entry=name,
        base_model="toy",
        base_model_fingerprint="0",
        adapter_fingerprint=None,
        dtype="float32",
        parameters=1,
        max_logit_difference=None,
        files={"model.safetensors": "1"},
    )
    package.write(entry_dir / "package.json")
    return entry_dir


def starts(*toys: Toy) -> StartServer:
    """Start the first server, then, once it has died, the second, and so on; the last for good."""
    remaining = list(toys)

    @contextmanager
    def start(log: Path) -> Iterator[Toy]:
        toy = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        log.write_text("loading\nToyError: out of words\n")
        Contained(counts=toy.contained).write(Contained.file(log))
        with serving(toy) as served:
            yield served

    return start


def run_stage(
    stage: StageRuns,
    record: Path,
    entry_dir: Path,
    *toys: Toy,
    engine: str = "",
    probe: Probe = UNPROBED,
    **limits: object,
) -> StageRecord:
    """`evaluate` with a toy server, or with several that replace each other; see `starts`.

    `record` is what `prepare_stage` wrote. There is no model, so tokens are estimated.
    """
    return serve_stage(stage, record, entry_dir, starts(*toys), engine=engine, probe=probe, **limits)


def serve_stage(
    stage: StageRuns,
    record: Path,
    entry_dir: Path,
    start: StartServer,
    *,
    engine: str = "",
    probe: Probe = UNPROBED,
    **limits: object,
) -> StageRecord:
    """`evaluate` with any server."""
    settings = EvaluateSettings(
        competition_id=stage.competition,
        runs=stage,
        limits=StageLimits.model_validate({"time_limit": 600, "threads": 8} | limits),
        track=Track(title="t", ram_gb=4, training_budget="600s"),
        probe=probe,
    )
    folder = EntryFolder.at(entry_dir, stage.closed)
    return evaluate(folder, settings, record, start, Window.of_model(folder.package), engine)

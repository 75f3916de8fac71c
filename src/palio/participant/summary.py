"""A rehearsal's results, in lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoConfig, PreTrainedConfig

from palio.config import Competition, Entry
from palio.errors import BadInput
from palio.evaluation.probe import lines
from palio.layout import EntryFolder
from palio.packaging.verify import findings_lines, verify_package
from palio.participant.estimate import Shape, estimate, measure, rows_of
from palio.participant.rehearsal import Rehearsal
from palio.records import DatasetManifest, PackageManifest, Panel, ProbeReport, StageRecord, read_record
from palio.scoring.columns import columns_of, stage_cells
from palio.scoring.panel import placed
from palio.text import duration


def summary(
    rehearsal: Rehearsal, entry: Entry, competition: Competition, panel: Path | None
) -> Iterator[str]:
    """Curation, package, probe, open answers, place in the panel, and what the whole would take."""
    at = rehearsal.folder
    if at.dataset.manifest.is_file():
        dataset = read_record(DatasetManifest, at.dataset.manifest)
        read = sum(source.rows for source in dataset.sources)
        yield f"curation: {dataset.rows} of the first {read} rows kept"
    yield from _package(at, rehearsal, entry)
    probe = read_record(ProbeReport, at.probe)
    yield f"probe: {sum(one.state == 'pass' for one in probe.checks)} of {len(probe.checks)} checks passed"
    yield from (f"  {line}" for line in lines(probe))
    yield from _scores(at, rehearsal, panel)
    yield from _whole_run(at, entry, competition, probe)


def _package(at: EntryFolder, rehearsal: Rehearsal, entry: Entry) -> Iterator[str]:
    if read_record(PackageManifest, at.package_manifest).kind != "model":
        return
    track = rehearsal.competition.tracks[entry.track]
    for line in findings_lines(verify_package(at.package, track=track, load=False)):
        if not line.startswith("skipped"):
            yield f"package: {line}"


def _scores(at: EntryFolder, rehearsal: Rehearsal, panel: Path | None) -> Iterator[str]:
    record = read_record(StageRecord, at.stage_record("open"))
    table = pq.read_table(at.tables("open").metrics)
    cells = stage_cells(rehearsal.competition, "open", record.runs, table)
    columns = columns_of(rehearsal.competition, "open")
    for column, cell in zip(columns, cells, strict=True):
        value = f"{cell.value:.3f}" if cell.value is not None else f"missing: {cell.reason}"
        yield f"open: {column.scenario}, {column.metric}: {value} on {cell.n} instances"
    if panel is None:
        yield "panel: none published for this track"
        return
    try:
        scores = placed(read_record(Panel, panel), columns, cells, "this entry")
    except BadInput as error:
        yield f"panel: {error}"
        return
    yield "panel, open score against it (few instances and few steps: an order of magnitude, not a rank):"
    yield from (f"  {value:.3f}  {name}" for name, value in scores.items())


def _whole_run(at: EntryFolder, entry: Entry, competition: Competition, probe: ProbeReport) -> Iterator[str]:
    track = competition.tracks[entry.track]
    if probe.projected_seconds is not None:
        per_request = probe.projected_seconds / max(1, probe.planned_requests)
        yield f"whole open stage: {per_request:.2f} s a request on this machine"
    measured = measure(at)
    if measured is None or entry.finetune is None or entry.dataset is None:
        return
    if read_record(PackageManifest, at.package_manifest).code:  # which is not run for an estimate
        config: PreTrainedConfig = PreTrainedConfig.from_dict(PreTrainedConfig.get_config_dict(at.package)[0])
    else:
        config = AutoConfig.from_pretrained(at.package, trust_remote_code=False)
    shape = Shape.of(config)
    manifest = read_record(DatasetManifest, at.dataset.manifest)
    rows_read = {source.name: source.rows for source in manifest.sources}
    rows = sum(
        rows_of(Path(source.path)) if source.path and Path(source.path).is_file() else rows_read[source.label]
        for source in entry.dataset.sources
    )
    full = estimate(entry.finetune, track, measured, rows, shape)
    cap = track.gpu_memory_gb or track.ram_gb
    yield (
        f"whole training: {full.steps} steps, about {duration(full.training_seconds)} of the budget of "
        f"{duration(track.training_budget)} ({full.grounds})"
    )
    yield f"whole training: about {full.training_bytes / 1e9:.1f} GB of the track's {cap:g} GB"

"""How many evaluation instances stand in a training dataset, by the rule of `palio.curation.overlap`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from palio.curation.overlap import Instance, InstanceIndex, read_instances
from palio.curation.rows import BATCH_ROWS, asked, shortened
from palio.errors import BadInput
from palio.layout import DatasetFolder
from palio.provenance import file_sha256
from palio.records import Contamination

NGRAM = 13  # words; as in the GPT-3 paper (arXiv 2005.14165, appendix C)


class Pair(NamedTuple):
    """A training row and an evaluation instance that it holds. Of the open stage only."""

    scenario: str
    instance: str
    source: str
    row: str
    shown: str
    """What the row asks, shortened."""


def contamination(
    dataset: Path,
    instances: Mapping[str, Path],
    *,
    competition: str,
    track: str,
    entry: str,
    ngram: int = NGRAM,
) -> Contamination:
    """Counts of each stage's instances that the dataset holds; no text leaves this function.

    Args:
        dataset: a dataset folder, or its train.parquet.
        instances: by stage the table of its instances (scenario, instance, text, reference).
    """
    table = _table(dataset)
    totals: dict[str, dict[str, int]] = {}
    found: dict[str, dict[str, int]] = {}
    open_questions = None
    for stage, path in instances.items():
        index = InstanceIndex(read_instances(path), ngram)
        hits = {number for _, _, numbers in _rows_that_hold(table, index) for number in numbers}
        total = Counter(instance.scenario for instance in index.instances)
        count = Counter(index.instances[number].scenario for number in hits)
        totals[stage] = {scenario: total[scenario] for scenario in sorted(total)}
        found[stage] = {scenario: count[scenario] for scenario in sorted(total)}
        if stage == "open":
            open_questions = _asked_as(path, {index.instances[number] for number in hits})
    return Contamination(
        competition=competition,
        track=track,
        entry=entry,
        ngram=ngram,
        dataset_sha256=file_sha256(table),
        instances=totals,
        contaminated=found,
        open_questions=open_questions,
    )


def _asked_as(path: Path, found: Collection[Instance]) -> dict[str, list[str]]:
    """Return the ids under which a stage asks instances, by HELM run."""
    texts = {(instance.scenario, instance.text) for instance in found}
    asked: dict[str, list[str]] = {}
    for row in pq.read_table(path, columns=["scenario", "run", "instance", "text"]).to_pylist():
        if (row["scenario"], row["text"]) in texts:
            asked.setdefault(row["run"], []).append(row["instance"])
    return {run: sorted(ids) for run, ids in sorted(asked.items())}


def contaminated_pairs(dataset: Path, instances: Path, ngram: int = NGRAM) -> Iterator[Pair]:
    """Every row that holds an instance, with the instance: for participants, and so for the open stage."""
    index = InstanceIndex(read_instances(instances), ngram)
    for row, question, numbers in _rows_that_hold(_table(dataset), index):
        for number in sorted(numbers):
            instance = index.instances[number]
            yield Pair(instance.scenario, instance.id, row[0], row[1], shortened(question))


def _table(dataset: Path) -> Path:
    path = DatasetFolder(dataset).rows if dataset.is_dir() else dataset
    if not path.is_file():
        raise BadInput(path, why="no such dataset", fix="curate it first")
    return path


def _rows_that_hold(table: Path, index: InstanceIndex) -> Iterator[tuple[tuple[str, str], str, set[int]]]:
    """Source and id, what is asked, and the instances found, of the rows that hold any."""
    columns, file = ["prompt", "completion", "history", "source", "id"], pq.ParquetFile(table)
    for name in columns:
        if name not in file.schema_arrow.names:
            raise BadInput(table, name, why="has no such column", fix="curate the dataset again")
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
        for place, numbers in enumerate(index.found_in(batch)):
            if numbers:
                (row,) = batch.slice(place, 1).to_pylist()
                yield (row["source"], row["id"]), asked(row), numbers

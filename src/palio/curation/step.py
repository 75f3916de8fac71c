"""One operation applied to the rows, batch by batch, from files to files.

    <folder>/00007.sketch.arrow   the sketch of batch 7, of an operation that needs all rows
    <folder>/reasons.arrow        its decision, batch by batch; it replaces the sketches
    <folder>/00007.arrow          the outcome of batch 7: rows kept, rows dropped with reasons, an account

A file exists or it does not. Whoever needs a missing file makes it, and everybody makes the same one:
processes of one machine, jobs on several, the run after a crash. So none of them affects the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from palio.config import Operation
from palio.curation.dataset import EXAMPLES
from palio.curation.operations import OperationContext, RowOperation, TableOperation, Verdict
from palio.curation.rows import Batch, asked, shortened, texts_of
from palio.curation.store import Stored, batch_file, read_batch, write_batches
from palio.errors import BadInput
from palio.limits import TooMuch
from palio.records import OperationReport

_REASON = pa.schema([pa.field("reason", pa.string())])
_KEPT, _DROPPED = 0, 1
_ACCOUNT = b"account"


@dataclass(frozen=True)
class Step:
    index: int
    """In the recipe, from 0."""
    operation: Operation
    rows: Path
    """Folder of the step before, or of the sources."""
    folder: Path
    context: OperationContext

    @property
    def name(self) -> str:
        return f"{self.index + 1} {self.operation.op}"

    @property
    def undecided(self) -> bool:
        """True if the operation needs all rows and has not decided on them."""
        return self.operation.needs_all_rows and self._reasons not in self._files()

    def without_sketch(self, batches: Iterable[int]) -> list[int]:
        files = self._files()
        return [number for number in batches if self._sketch(number) not in files]

    def without_outcome(self, batches: Iterable[int]) -> list[int]:
        files = self._files()
        return [number for number in batches if batch_file(self.folder, number) not in files]

    def sketch(self, number: int) -> int:
        """Write the sketch of a batch; return its number of rows."""
        assert isinstance(self.operation, TableOperation)
        batch = self._batch(number)
        sketch = self.operation.sketch(batch, self.context)
        write_batches(self._sketch(number), sketch.schema, [sketch])
        return len(batch)

    def decide(self, batches: Sequence[int]) -> None:
        """Decide on all rows from the sketches of all batches."""
        assert isinstance(self.operation, TableOperation)
        sketches = [self._sketch(number) for number in batches]
        decided = self.operation.decide(Stored(sketches), self.context)
        reasons = (pa.record_batch([pa.array(batch, pa.string())], schema=_REASON) for batch in decided)
        write_batches(self._reasons, _REASON, reasons)
        for file in sketches:
            file.unlink()

    def apply(self, number: int) -> int:
        """Carry out the verdict on a batch; return its number of rows."""
        batch = self._batch(number)
        if isinstance(self.operation, RowOperation):
            try:
                verdict = self.operation.apply(batch, self.context)
            except TooMuch as error:
                key, why = f"operations.{self.index}", f"takes too much: {error} of batch {number}"
                fix = "simplify its patterns"
                raise BadInput("dataset", key, self.operation.op, why=why, fix=fix) from None
        else:
            verdict = Verdict(read_batch(self._reasons, number)["reason"].to_pylist())
        kept, dropped, account = self._carried_out(batch.table, verdict)
        schema = kept.schema.with_metadata({_ACCOUNT: account.model_dump_json()})
        write_batches(batch_file(self.folder, number), schema, [kept, dropped])
        return len(batch)

    def dropped(self, batches: Iterable[int]) -> Stored:
        """Return the dropped rows as they came in, with a column `reason`."""
        return Stored([batch_file(self.folder, number) for number in batches], _DROPPED)

    def report(self, batches: Iterable[int]) -> OperationReport:
        rows_in = rows_out = changed = 0
        by_source: Counter[str] = Counter()
        examples: list[str] = []
        for number in batches:
            file = batch_file(self.folder, number)
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
                account = OperationReport.model_validate_json(reader.schema.metadata[_ACCOUNT])
            rows_in += account.rows_in
            rows_out += account.rows_out
            changed += account.changed
            by_source.update(account.dropped_by_source)
            examples += account.examples[: EXAMPLES - len(examples)]
        return self._report(rows_in, rows_out, changed, by_source, examples)

    def _batch(self, number: int) -> Batch:
        rows = read_batch(batch_file(self.rows, number), _KEPT)
        return Batch(rows.select([name for name in rows.schema.names if name not in _REASON.names]))

    def _files(self) -> set[Path]:
        """List the folder: asked for single files, a network file system may hide what other nodes wrote."""
        return set(self.folder.glob("*.arrow"))

    def _sketch(self, number: int) -> Path:
        return self.folder / f"{number:05}.sketch.arrow"

    @property
    def _reasons(self) -> Path:
        return self.folder / "reasons.arrow"

    def _carried_out(
        self, before: pa.RecordBatch, verdict: Verdict
    ) -> tuple[pa.RecordBatch, pa.RecordBatch, OperationReport]:
        """Return the rows kept, with their new texts; the rows dropped, as they came in; and the account of
        both."""
        reasons = pa.array(verdict.reasons, pa.string())
        keep = pc.is_null(reasons)
        dropped = _outcome(before, reasons).filter(pc.invert(keep))
        kept = _outcome(verdict.rewritten or before, reasons).filter(keep)
        shown = dropped.slice(0, EXAMPLES).to_pylist()
        examples = [
            f"{row['reason']}: {shortened(asked(row))} → {shortened(row['completion'], 40)}" for row in shown
        ]
        changed = 0
        if verdict.rewritten:
            changed, rewritten = _rewritten(before.filter(keep), kept)
            examples += rewritten[: EXAMPLES - len(examples)]
        by_source = Counter(dropped["source"].to_pylist())
        return kept, dropped, self._report(before.num_rows, kept.num_rows, changed, by_source, examples)

    def _report(
        self, rows_in: int, rows_out: int, changed: int, by_source: Counter[str], examples: list[str]
    ) -> OperationReport:
        return OperationReport(
            op=self.operation.op,
            settings=self.operation.model_dump(mode="json", exclude={"op"}),
            rows_in=rows_in,
            rows_out=rows_out,
            changed=changed,
            dropped_by_source=dict(sorted(by_source.items())),
            examples=examples,
        )


def _outcome(rows: pa.RecordBatch, reasons: pa.Array) -> pa.RecordBatch:
    schema = rows.schema.append(_REASON.field("reason"))
    return pa.RecordBatch.from_arrays([*rows.columns, reasons], schema=schema)


def _rewritten(before: pa.RecordBatch, after: pa.RecordBatch) -> tuple[int, list[str]]:
    """Return how many rows differ, and for the first of them the first turn that does."""
    differs = pc.not_equal(texts_of(before), texts_of(after))
    old, new = (Batch(rows.filter(differs).slice(0, EXAMPLES)).turns for rows in (before, after))
    examples = []
    for pairs in map(zip, old, new):
        one, other = next((one, other) for one, other in pairs if one != other)
        examples.append(f"{ascii(one)[:80]} → {ascii(other)[:80]}")
    return pc.sum(differs).as_py() or 0, examples

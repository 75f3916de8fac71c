"""The dataset's card: what a reader needs to know of it, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palio.curation.rows import asked, shortened
from palio.records import DatasetManifest, OperationReport
from palio.text import markdown_table


def card(manifest: DatasetManifest, examples: Sequence[Mapping[str, Any]]) -> str:
    """The card of a dataset; `examples` are rows of it."""
    parts = [
        f"# Training data of {manifest.entry}",
        f"{manifest.rows} rows, shuffled with seed {manifest.seed}. Competition {manifest.competition}, "
        f"track {manifest.track}. sha256 of train.parquet: `{manifest.sha256}`.",
        "## Sources",
        markdown_table(
            ["source", "licence", "written by", "rows read", "malformed", "rows kept", "sha256"],
            [
                [
                    source.name,
                    source.licence,
                    source.generator or "people",
                    source.rows,
                    source.quarantined,
                    manifest.rows_by_source.get(source.name, 0),
                    f"`{source.sha256[:16]}`",
                ]
                for source in manifest.sources
            ],
        ),
        "## Operations",
        _operations(manifest.operations),
        "## Examples",
        *(
            f"From {row['source']}: {_inline(shortened(asked(row), 300))} → "
            f"{_inline(shortened(row['completion'], 120))}"
            for row in examples
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _operations(operations: Sequence[OperationReport]) -> str:
    if not operations:
        return "None: the rows are as the sources have them."
    overview = markdown_table(
        ["", "operation", "settings", "rows in", "dropped", "rewritten", "rows out"],
        [
            [
                number,
                report.op,
                ", ".join(f"{key}: {value}" for key, value in report.settings.items()) or "-",
                report.rows_in,
                report.rows_in - report.rows_out,
                report.changed,
                report.rows_out,
            ]
            for number, report in enumerate(operations, start=1)
        ],
    )
    shown = [
        f"{number} {report.op}, for example:\n\n"
        + "\n".join(f"- {_inline(text)}" for text in report.examples)
        for number, report in enumerate(operations, start=1)
        if report.examples
    ]
    return "\n\n".join([overview, *shown])


def _inline(text: str) -> str:
    """As code, so that markup in a row shows instead of acting."""
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"

"""Arrow schemas of the two tables of a stage: helm/<stage>/{metrics,instances}.parquet."""

from __future__ import annotations

import pyarrow as pa

_NAMES = ("competition", "track", "entry", "stage", "scenario", "run")
_RUN = [pa.field(name, pa.string(), nullable=False) for name in _NAMES]
_SCORE = [
    pa.field("metric", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("perturbation", pa.string()),
    pa.field("value", pa.float64()),
]

METRICS_SCHEMA = pa.schema([*_RUN, *_SCORE, pa.field("n", pa.int64(), nullable=False)])
"""One row per HELM statistic: its mean over `n` instances; `value` is null if n is 0."""

INSTANCES_SCHEMA = pa.schema([*_RUN, pa.field("instance", pa.string(), nullable=False), *_SCORE])
"""One row per instance and metric; `instance` is HELM's id and never text of the instance."""

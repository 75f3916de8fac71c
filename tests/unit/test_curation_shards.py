"""Curation shared by several jobs: whatever their number, and whatever becomes of them, one dataset."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palio.config import DatasetRecipe, operation_names
from palio.curation.curate import curate_ahead
from palio.errors import BadInput, NotRetried
from palio.layout import EntryFolder
from palio.operating.attempt import read_attempts
from palio.records import StepFailure, read_record
from palio.settings import CurateSettings, slice_of
from tests.support.curation import curate, digests, finished, pairs_of, recipe, write_jsonl
from tests.support.training import tiny_base_model

ROOT = Path(__file__).parents[2]
TOWNS = ["Siena", "Pisa", "Lucca", "Arezzo", "Firenze", "Prato", "Massa", "Livorno", "Grosseto"]


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> object:
    """Of 20 rows, so that a small source has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palio.curation.reading.BATCH_ROWS", 20)
        yield


def rows(count: int, seed: int) -> list[dict[str, object]]:
    """Questions for every operation to find something in; 60 in a row are refused."""
    draw = random.Random(seed)
    made: list[dict[str, object]] = []
    for number in range(count):
        town, other, day = draw.choice(TOWNS), draw.choice(TOWNS), draw.choice("123456789")
        prompt = f"<p>How many riders went from {town} to {other} on day {day} of the long race"
        prompt += draw.choice(
            ["?</p>", "?</p>", "?</p>", " then?</p>", " then, " + "and why " * 20 + "?</p>"]
        )
        answer = draw.choice(["One of them", "One of them", "one of  them", "Two of them", "Nessuno di loro"])
        if answer == "Nessuno di loro":
            prompt = (
                f"Quanti fantini sono andati da {town} a {other} nel giorno {day} della gara di primavera?"
            )
        answer = "As an AI I cannot say." if 100 <= number < 160 else answer
        made.append({"id": number, "prompt": prompt, "completion": answer, "reward": number % 7})
        made[-1]["riders"] = {"of": town}
    return made


def in_shards(given: DatasetRecipe, out: Path, shards: int, base_model: Path = Path("none")) -> None:
    """As the workflow does it: a job after the other, those of a phase in any order."""
    work = out.parent / "work/curate"
    draw = random.Random(shards)
    for join in range(given.phases + 1):
        for number in draw.sample(range(1, shards + 1), shards) if join else ():
            curate_ahead(given, base_model=base_model, entry="civetta", work=work, shard=(number, shards))
        curate_ahead(given, base_model=base_model, entry="civetta", work=work, join=join)
    ahead = finished(work)
    curate(given, out, base_model)
    assert ahead.items() <= finished(work).items(), "what the shards had done was done again"


@pytest.fixture(scope="module")
def every_operation(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> DatasetRecipe:
    folder = tmp_path_factory.mktemp("sources")
    many, few = rows(500, seed=0), rows(60, seed=1)
    write_jsonl(folder / "many.jsonl", [*many, {"prompt": 1}])
    write_jsonl(folder / "few.jsonl", few)
    model = tiny_base_model(folder / "tiny", base_model) / "model"
    question = {"scenario": "quiz", "instance": "id7", "reference": "2", "text": str(many[3]["prompt"])[3:-4]}
    pq.write_table(pa.Table.from_pylist([question]), folder / "instances.parquet")
    sources = [{"path": str(folder / name), "score": "reward"} for name in ("many.jsonl", "few.jsonl")]
    return recipe(
        sources,
        "clean_markup",
        "drop_refusals",
        {"op": "replace_matches", "pattern": "long (race)", "by": r"\1"},
        "drop_disagreement",
        "drop_exact_duplicates",
        {"op": "drop_matches", "patterns": ["day 9"]},
        {"op": "keep_where", "field": "reward", "max": 5},
        {"op": "drop_where", "field": "riders.of", "matches": "^mas"},
        {"op": "keep_languages", "min_characters": 20},
        {"op": "keep_quality", "max_top_words": 0.9, "refused": ["on day 8"]},
        {"op": "length_filter", "min_prompt": 63},
        {"op": "token_length", "max": 60},
        {"op": "drop_near_duplicates", "threshold": 0.7},
        {"op": "decontaminate", "instances": str(folder / "instances.parquet"), "ngram": 8},
        {"op": "drop_semantic_duplicates", "model": str(model), "threshold": 0.99},
        {"op": "cap_rows", "rows": 40},
        {"op": "sample_rows", "rows": 70, "by": "score", "temperature": 2},
        {"op": "sample_rows", "rows": 60, "by": "diversity"},
        {"op": "sample_rows", "rows": 50, "weights": {"few": 2}},
    )


@pytest.fixture(scope="module")
def of_one_job(
    every_operation: DatasetRecipe, base_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    out = tmp_path_factory.mktemp("one") / "dataset"
    manifest = curate(every_operation, out, base_model)
    assert {one.op for one in manifest.operations} == set(operation_names())
    idle = [one.op for one in manifest.operations if not one.changed and one.rows_in == one.rows_out]
    assert not idle, "each operation is to have something to do"
    return digests(out)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 30])
def test_shards_make_the_dataset_of_one_job_whatever_their_number(
    shards: int, every_operation: DatasetRecipe, of_one_job: dict[str, str], base_model: Path, tmp_path: Path
) -> None:
    """Byte by byte, with every operation there is; 30 shards are more than there are batches, and a few
    batches are dropped whole on the way."""
    in_shards(every_operation, tmp_path / "dataset", shards, base_model)
    assert digests(tmp_path / "dataset") == of_one_job


@settings(max_examples=25)
@given(
    pairs=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), min_size=1, max_size=120),
    operations=st.lists(
        st.sampled_from(("drop_disagreement", "drop_exact_duplicates", "drop_refusals")), max_size=4
    ),
    shards=st.integers(1, 5),
)
def test_any_rows_and_any_order_of_operations_give_the_same_in_shards(
    pairs: list[tuple[str, str]],
    operations: list[str],
    shards: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    lines = [{"prompt": f"{prompt}{n % 7}", "completion": answer} for n, (prompt, answer) in enumerate(pairs)]
    given = recipe([{"path": str(write_jsonl(folder / "a.jsonl", lines))}], *operations)
    results: list[dict[str, str]] = []
    for how in (lambda out: curate(given, out), lambda out: in_shards(given, out, shards)):
        out = folder / str(len(results)) / "dataset"
        try:
            how(out)
            results.append(digests(out))
        except BadInput as fault:  # no row is left
            results.append({"fault": str(fault)})
    assert results[0] == results[1]


def test_changing_the_number_of_shards_on_the_way_redoes_nothing(
    every_operation: DatasetRecipe, of_one_job: dict[str, str], base_model: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work/curate"
    curate_ahead(every_operation, base_model=base_model, entry="civetta", work=work, shard=(2, 3))
    before = finished(work)
    in_shards(every_operation, tmp_path / "dataset", 2, base_model)
    assert before.items() <= finished(work).items()
    assert digests(tmp_path / "dataset") == of_one_job


def test_a_source_that_changes_between_two_jobs_is_read_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1 + 1 =", "completion": "2"}])
    given = recipe([{"path": str(source)}], "drop_exact_duplicates")
    work = tmp_path / "work/curate"
    curate_ahead(given, base_model=Path("none"), entry="civetta", work=work)
    write_jsonl(source, [{"prompt": "1 + 2 =", "completion": "3"}])
    curate_ahead(given, base_model=Path("none"), entry="civetta", work=work, shard=(1, 1))
    curate(given, tmp_path / "dataset")
    assert pairs_of(tmp_path / "dataset/train.parquet") == [("1 + 2 =", "3")]


def test_a_killed_shard_goes_on_behind_its_last_batch(tmp_path: Path) -> None:
    """kill -9 in the middle of a shard that others have finished: no batch is done twice."""
    lines = ({"prompt": f"<p>What is {n} + {n}?</p>", "completion": str(2 * n)} for n in range(6000))
    given = recipe(
        [{"path": str(write_jsonl(tmp_path / "many.jsonl", lines))}],
        *("clean_markup", "drop_refusals", "drop_exact_duplicates"),
    )
    out, work = tmp_path / "killed/dataset", tmp_path / "killed/work/curate"
    ahead = {"base_model": Path("none"), "entry": "civetta", "work": work}
    curate_ahead(given, **ahead)  # type: ignore[arg-type]
    curate_ahead(given, shard=(1, 2), **ahead)  # type: ignore[arg-type]
    of_the_first = finished(work)
    program = (
        "import sys; from pathlib import Path; from palio.config import DatasetRecipe; "
        "from palio.curation.curate import curate_ahead; "
        "curate_ahead(DatasetRecipe.model_validate_json(sys.argv[1]), base_model=Path('none'), "
        "entry='civetta', work=Path(sys.argv[2]), shard=(2, 2))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, given.model_dump_json(), str(work)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(finished(work)) < len(of_the_first) + 20:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(work)
    in_shards(given, out, 2)
    after = finished(work)
    assert len(before) < len(after)
    assert before.items() <= after.items()
    curate(given, tmp_path / "whole/dataset")
    assert digests(out) == digests(tmp_path / "whole/dataset")


def test_what_a_shard_cannot_do_is_left_to_the_run_that_tells_why(tmp_path: Path) -> None:
    """Of a broken source the jobs ahead say so in their logs and end well: the last one puts it on record."""
    entry_dir = tmp_path / "results/laptop/civetta"
    given = recipe([{"path": str(tmp_path / "gone.jsonl")}], "drop_exact_duplicates")
    settings = CurateSettings(
        competition_id="demo", dataset=given, base_model_id="none", team_folders=(str(tmp_path),)
    )
    arguments = ["step", "curate", str(entry_dir), "--settings", slice_of(settings)]
    ends = []
    for ahead in (["--join", "0"], ["--shard", "1-of-2"], ["--join", "1"], []):
        command = [sys.executable, "-m", "palio.cli", *arguments, *ahead]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        ends.append((done.returncode, "gone.jsonl: no such file" in done.stdout + done.stderr))
    assert ends == [(0, True), (0, True), (0, True), (2, True)]
    assert (entry_dir / "work/failures/curate.json").is_file()


def test_a_shard_that_is_killed_for_good_is_on_record(tmp_path: Path) -> None:
    """As one that needs more memory than its job has: with retries the third attempt says so, and another
    shard of the same run leaves that word alone."""
    lines = ({"prompt": f"What is {n} + {n}?", "completion": str(2 * n)} for n in range(200_000))
    source = write_jsonl(tmp_path / "many.jsonl", lines)
    given = recipe([{"path": str(source)}], "drop_exact_duplicates")
    settings = CurateSettings(
        competition_id="demo", dataset=given, base_model_id="none", team_folders=(str(tmp_path),)
    )
    folder = EntryFolder.at(tmp_path / "results/laptop/civetta")

    def start(shard: str, run: str = "one") -> subprocess.Popen[bytes]:
        arguments = ["step", "curate", str(folder.path), "--settings", slice_of(settings), "--shard", shard]
        environment = {**os.environ, "PALIO_RUN": run}
        return subprocess.Popen([sys.executable, "-m", "palio.cli", *arguments], cwd=ROOT, env=environment)

    for number in (1, 2):
        process = start("1-of-2")
        while len(read_attempts(folder)) < number:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert not folder.failure("curate").exists()
    assert start("1-of-2").wait() == NotRetried.exit_code
    failure = read_record(StepFailure, folder.failure("curate"))
    assert (failure.step, failure.state) == ("curate", "crashed")
    assert failure.reason == "killed twice, no error reported: out of memory, or a faulty node"
    write_jsonl(source, [{"prompt": "1 + 1 =", "completion": "2"}])
    assert start("2-of-2").wait() == 0
    assert folder.failure("curate").exists()
    assert start("1-of-2", run="another").wait() == 0  # started again, perhaps with more memory
    assert not folder.failure("curate").exists()

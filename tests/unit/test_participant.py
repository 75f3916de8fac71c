"""What a team does on its own machine: a new entry that works, the whole run in small, what to expect."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from transformers import (
    BertConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

from palio.cli import palio
from palio.config import DatasetRecipe, Entry, FinetuneRecipe, Track, load_competition, load_entry, load_rules
from palio.curation.files import file_records
from palio.curation.rows import Malformed
from palio.errors import BadInput, OutOfMemory
from palio.evaluation.helm.folder import CONTEXT_TOKENS
from palio.incoming import Incoming
from palio.layout import Project
from palio.participant.estimate import Estimate, Measured, Shape, estimate, rows_of
from palio.participant.preview import preview
from palio.participant.rehearsal import small_competition, small_entry, write_head
from palio.records import Cell, Column, Leaderboard
from palio.scoring.leaderboard import Candidate, score
from palio.scoring.panel import panel_of, placed
from palio.serving.model import GPU_SPARE, cache_tokens, context_of
from palio.tensors import cache_bytes, meta_model
from tests.support.folder import WorkingFolder
from tests.support.training import tiny_base_model
from tests.unit.test_tokens import byte_level


def dataset_of(name: str) -> DatasetRecipe:
    """The recipe of an entry of the demo's folder."""
    recipe = load_entry(Path(f"config/entries/demo/{name}.yaml")).dataset
    assert recipe is not None
    return recipe


# --- new -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["recipe", "command", "server"])
def test_a_new_entry_of_each_kind_is_clean(folder: WorkingFolder, kind: str) -> None:
    made = folder.run(
        "palio", "new", "config/entries/demo/drago.yaml", "--kind", kind, "--team", "Contrada del Drago"
    )
    assert made.returncode == 0, made.stderr
    assert folder.run("palio", "check", "config/entries/demo/drago.yaml").returncode == 0
    entry = load_entry(Path("config/entries/demo/drago.yaml"))
    assert (entry.kind, entry.team, entry.track) == (kind, "Contrada del Drago", "laptop")
    for source in entry.dataset.sources if entry.dataset else ():
        assert Path(str(source.path)).stat().st_size
    for program in entry.programs.values():
        assert list(Path(program.files or "").glob("*.py"))


def test_a_new_entry_from_a_dockerfile_names_its_folder(folder: WorkingFolder) -> None:
    own = folder.path / "resources/teams/drago"
    own.mkdir(parents=True)
    line = ("palio", "new", "config/entries/demo/drago.yaml", "--team", "Drago", "--dockerfile")
    server = ("resources/teams/drago", "--kind", "server")
    assert "has no Dockerfile; give the folder that has one" in folder.run(*line, *server).stderr
    (own / "Dockerfile").write_text("FROM scratch\n")
    assert "say --kind server" in folder.run(*line, "resources/teams/drago").stderr
    made = folder.run(*line, *server)
    assert made.returncode == 0, made.stderr
    (program,) = load_entry(Path("config/entries/demo/drago.yaml")).programs.values()
    assert (program.paths, program.run) == ({"dockerfile": "resources/teams/drago"}, None)


def test_a_new_entry_tells_editors_its_schema(folder: WorkingFolder) -> None:
    folder.run("palio", "new", "config/entries/demo/drago.yaml", "--kind", "server", "--team", "Drago")
    made = folder.path / "config/entries/demo/drago.yaml"
    marker, _, schema = made.read_text().partition("\n")[0].partition("=")
    assert marker == "# yaml-language-server: $schema"
    assert (made.parent / schema).resolve() == folder.path / "config/schemas/entry.json"


def test_what_is_left_out_is_asked_for(folder: WorkingFolder) -> None:
    data = folder.path / "resources/teams/drago/mine.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    made = folder.run(
        *("palio", "new", "config/entries/demo/drago.yaml", "--data", str(data.relative_to(folder.path))),
        given="Drago\nCC0-1.0\n",
    )
    assert made.returncode == 0, made.stderr
    (source,) = dataset_of("drago").sources
    assert (source.path, source.licence) == ("resources/teams/drago/mine.jsonl", "CC0-1.0")


NEURIPS = "config/neurips2023.yaml"
COMMIT = "0123456789" * 4
MODEL = "hub:hpcai-tech/Colossal-LLaMA-2-7b-base"


def test_a_new_entry_for_neurips2023_asks_for_data_and_for_the_commit_that_no_network_can_tell(
    folder: WorkingFolder,
) -> None:
    data = folder.path / "resources/teams/drago/mine.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    file = "config/entries/neurips2023/drago.yaml"
    answers = ["Drago", "resources/teams/drago/mine.jsonl", "WTFPL", "MIT", "https://drago.example/data"]
    made = folder.run(
        *("palio", "new", file, "--competition", NEURIPS),
        given="\n".join([*answers, "main", COMMIT, ""]),
        environment=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert made.returncode == 0, made.stderr
    assert "names no commit, and the hub does not answer; connect to the network, or write" in made.stderr
    assert (
        "resources/teams/drago/mine.jsonl, licence: MIT, url: https://drago.example/data"
        in (folder.path / file).read_text()
    )
    assert f"hub: {MODEL.removeprefix('hub:')}@{COMMIT}" in (folder.path / file).read_text()
    next_line = made.stdout.splitlines()[-1]
    assert next_line.endswith(f"next: palio try {file} --competition {NEURIPS}")
    assert folder.run("palio", "check", file, "--competition", NEURIPS).returncode == 0


def test_with_a_network_the_hub_tells_the_commit(
    folder: WorkingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model_info(self: object, repo: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        assert (repo, revision) == (MODEL.removeprefix("hub:"), None)
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    arguments = ["new", "drago.yaml", "--team", "Drago", "--kind", "server", "--competition", NEURIPS]
    made = CliRunner().invoke(palio, arguments, catch_exceptions=False)
    assert made.exit_code == 0, made.output
    assert f"{MODEL.removeprefix('hub:')}@{COMMIT}" in Path("drago.yaml").read_text()


def test_example_data_says_truly_where_it_comes_from(folder: WorkingFolder) -> None:
    folder.run("palio", "new", "config/entries/demo/drago.yaml", "--team", "Drago")
    sources = dataset_of("drago").sources
    assert {(one.licence, one.generator, one.url) for one in sources} == {
        ("CC0-1.0", "palio demo-data", None)
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("config/entries/demo/curated.yaml",),
            "config/entries/demo/curated.yaml: already exists; choose another name",
        ),
        (("two words.yaml",), "name it <id>.yaml, the id of letters, digits, - and _"),
        (("x.yaml", "--track", "moon"), "--track is 'moon': use one of laptop"),
        (("x.yaml", "--base-model", "gpt2"), "write hub:org/name@<commit>"),
        (("x.yaml", "--data", "a.jsonl", "--licence", "WTFPL"), "use data under one of CC0-1.0"),
    ],
)
def test_a_new_entry_that_cannot_be_is_refused_with_one_line(
    folder: WorkingFolder, arguments: tuple[str, ...], line: str
) -> None:
    made = folder.run("palio", "new", *arguments, "--team", "Drago")
    assert made.returncode == 2
    assert line in made.stderr
    assert "Traceback" not in made.stderr


# --- the small run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_the_head_of_a_source_has_its_first_records(tmp_path: Path, name: str) -> None:
    """Records, not lines: an array is spread over lines, and a quoted field holds some."""
    rows = [{"prompt": f"p{n}\nand more", "completion": f"c{n}"} for n in range(50)]
    source = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    elif name.endswith(("csv", "tsv")):
        with source.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="," if name == "a.csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif name == "a.json":
        source.write_text(json.dumps(rows, indent=2))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        source.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    head = tmp_path / "head" / (name if name == "a.parquet" else "head.jsonl")
    assert write_head(source, head, 7)
    assert [record for _, record in file_records(Incoming.locate(head, []))] == rows[:7]
    assert not write_head(source, head, 50)
    assert rows_of(source) == 50


def test_a_broken_record_is_in_the_head_of_a_source_too(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"prompt": "p", "completion": "c"}\n{"prompt"\n')
    write_head(source, tmp_path / "head.jsonl", 7)
    _, (_, broken) = file_records(Incoming.locate(tmp_path / "head.jsonl", []))
    assert isinstance(broken, Malformed)


def test_a_rehearsal_changes_size_and_nothing_else_of_an_entry(folder: WorkingFolder) -> None:
    competition = load_competition(Path("config/config.yaml"))
    entry = load_entry(Path("config/entries/demo/curated.yaml"))
    assert entry.finetune is not None
    small = small_entry(entry, Project(folder.path / "try/curated"))
    assert small["finetune"]["max_steps"] == 3
    assert small["finetune"]["learning_rate"] == entry.finetune.learning_rate
    assert [one["op"] for one in small["dataset"]["operations"]] == [
        one.op for one in dataset_of("curated").operations
    ]
    content = small_competition(competition, entry)
    scenario = content["stages"]["open"]["scenarios"]["pattern_match"]
    assert scenario["questions"] == 4
    assert "max_eval_instances" not in scenario
    assert scenario["metrics"] == {"exact match": {"metric": "exact_match"}}


def test_a_rehearsal_leaves_out_what_it_cannot_judge_by_the_heads_and_says_so(
    folder: WorkingFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field that first comes after the head is no fault; in sources read whole, the reading refuses it."""
    rows = [
        {"prompt": f"q{n}", "completion": "a", "n": n, **({"lang": "it"} if n > 200 else {})}
        for n in range(202)
    ]
    source = folder.path / "late.jsonl"
    demo = load_entry(Path("config/entries/demo/curated.yaml"))
    content = demo.model_dump(mode="json", exclude_none=True)
    content["dataset"]["sources"] = [{"path": str(source), "licence": "MIT"}]
    content["dataset"]["operations"] = [
        {"op": "drop_where", "field": "n", "min": 9},
        {"op": "drop_where", "field": "lang", "equals": "it"},
    ]
    entry = Entry.model_validate(content)

    def rehearsed(rows: list[dict[str, Any]]) -> list[str]:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        operations = small_entry(entry, Project(folder.path / "try/late"))["dataset"]["operations"]
        return [one["field"] for one in operations]

    assert rehearsed(rows) == ["n"]
    assert capsys.readouterr().err == (
        "notice: operations.1 (drop_where) is left out: the first 200 records of each source have no 'lang'\n"
    )
    assert rehearsed(rows[:200]) == ["n", "lang"]
    assert capsys.readouterr().err == ""


def test_a_rehearsal_knows_nothing_of_the_organizers_other_entries(folder: WorkingFolder) -> None:
    decided = {"withdrawn": {"raw": "asked to"}, "retries": {"raw": {"open": 1}}, "shards": {"raw": 8}}
    folder.edit_yaml("config/config.yaml", lambda config: config.update(decided))
    competition = load_competition(Path("config/config.yaml"))
    entry = load_entry(Path("config/entries/demo/curated.yaml"))
    small = small_competition(competition, entry)
    assert {key: small[key] for key in decided} == {key: {} for key in decided}


def test_the_whole_run_in_small_ends_with_a_place_and_an_estimate(
    folder: WorkingFolder, base_model: Path
) -> None:
    """The real workflow, HELM and server; a tiny model of random weights."""
    tiny_base_model(folder.path / "tiny", base_model)
    model = str(folder.path / "tiny/model")

    def approve(rules: dict[str, Any]) -> None:
        rules["base_models"][0]["sources"].append(f"path:{model}")

    folder.edit_yaml("config/rulesets/demo.yaml", approve)
    folder.run(
        "palio", "new", "config/entries/demo/drago.yaml", "--team", "Drago", "--base-model", f"path:{model}"
    )
    folder.edit_entry("drago", lambda entry: entry["finetune"].update(max_length=256))
    done = folder.run("palio", "try", "config/entries/demo/drago.yaml", timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout
    assert "check: clean" in told
    assert "base model: llama, " in told
    assert "package: pass     files:" in told
    assert "checks passed" in told
    assert "open: pattern_match, exact match:" in told
    assert "this entry" in told
    assert "of the budget of 10 min (this machine's speed)" in told
    assert not (folder.path / "results").exists()
    assert not (folder.path / "resources/stages").exists()


def test_a_rehearsal_of_an_entry_that_breaks_a_rule_ends_at_once(folder: WorkingFolder) -> None:
    folder.edit_entry("untuned", lambda entry: entry.update(base_model={"hub": "acme/secret"}))
    done = folder.run("palio", "try", "config/entries/demo/untuned.yaml")
    assert done.returncode == 3
    assert "hub:acme/secret is not approved" in done.stderr
    assert not (folder.path / "try").exists()


@pytest.mark.slow
def test_a_server_that_ends_at_start_is_told_with_its_last_lines_and_the_path_of_its_log(
    folder: WorkingFolder, base_model: Path
) -> None:
    tiny_base_model(folder.path / "tiny", base_model)
    model = str(folder.path / "tiny/model")
    folder.edit_yaml(
        "config/rulesets/demo.yaml", lambda rules: rules["base_models"][0]["sources"].append(f"path:{model}")
    )
    folder.run(
        *("palio", "new", "config/entries/demo/drago.yaml", "--kind", "server", "--team", "Drago"),
        *("--base-model", f"path:{model}"),
    )
    (program,) = (folder.path / "resources/teams").glob("*/program/main.py")
    program.write_text("import loguru_of_2023\n")
    done = folder.run("palio", "try", "config/entries/demo/drago.yaml", timeout=600)
    assert done.returncode == 6
    assert "No module named 'loguru_of_2023'" in done.stderr
    assert "hand in loguru_of_2023 with server.files" in done.stderr
    log = folder.path / done.stderr.rpartition("log: ")[2].strip()
    assert log.is_relative_to(folder.path / "try/drago")
    assert "No module named 'loguru_of_2023'" in log.read_text()


# --- the panel -------------------------------------------------------------------------------------------

COLUMNS = [
    Column(stage="open", scenario="s", metric="EM"),
    Column(stage="closed", scenario="secret", metric="EM"),
]


def board() -> Leaderboard:
    values = {"a": (0.1, 0.9), "b": (0.5, 0.8), "c": (0.9, 0.7)}
    candidates = [
        Candidate(name, name, [Cell(value=value, n=10) for value in of]) for name, of in values.items()
    ]
    return score(
        competition="c",
        track="t",
        columns=COLUMNS,
        candidates=candidates,
        stage_weights={"open": 1 / 3, "closed": 2 / 3},
    )


def test_a_panel_holds_open_values_and_nothing_of_the_closed_stage() -> None:
    panel = panel_of(board())
    assert {one.entry: one.values for one in panel.entries} == {"a": [0.1], "b": [0.5], "c": [0.9]}
    assert "secret" not in panel.model_dump_json()
    assert [one.entry for one in panel_of(board(), ["b"]).entries] == ["b"]
    with pytest.raises(BadInput, match="'z': is not on the leaderboard"):
        panel_of(board(), ["z"])


def test_an_entry_is_placed_by_the_share_of_the_panel_it_beats() -> None:
    found = placed(panel_of(board()), COLUMNS[:1], [Cell(value=0.6, n=4)], "mine")
    assert found["mine"] == pytest.approx(2 / 3)
    assert next(iter(found)) == "c"


def test_a_panel_of_other_columns_is_refused() -> None:
    with pytest.raises(BadInput, match="made for other columns"):
        placed(panel_of(board()), COLUMNS[1:], [Cell(value=0.6, n=4)], "mine")


# --- the base model without its weights --------------------------------------------------------------------

LLAMA = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TODAYS: dict[str, tuple[PretrainedConfig, int, bool]] = {
    "Llama-3.1-8B": (LLAMA, 8_030_261_248, False),
    "Qwen2.5-7B": (
        Qwen2Config(
            vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131_072,
        ),
        7_615_616_512,
        False,
    ),
    "Gemma-2-9B": (
        Gemma2Config(
            vocab_size=256_000, hidden_size=3584, intermediate_size=14_336, num_hidden_layers=42,
            num_attention_heads=16, num_key_value_heads=8, head_dim=256, max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        9_241_705_984,
        True,
    ),
    "Phi-4-mini": (
        Phi3Config(
            vocab_size=200_064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
            num_attention_heads=24, num_key_value_heads=8, max_position_embeddings=131_072,
            tie_word_embeddings=True,
        ),
        3_836_021_760,
        False,
    ),
}  # fmt: skip
"""Config, published number of parameters, and whether a request of the whole context fits on 24 GB."""


@pytest.mark.parametrize("name", TODAYS)
def test_models_of_today_are_served_on_24_gb_with_the_context_of_the_competition(
    name: str, tmp_path: Path
) -> None:
    config, parameters, whole = TODAYS[name]
    config.save_pretrained(tmp_path)
    assert meta_model(tmp_path).num_parameters() == parameters
    left = 24 * (1 - GPU_SPARE) - 2 * parameters / 1e9
    served = SimpleNamespace(context=CONTEXT_TOKENS, token_bytes=cache_bytes(config, 2))
    assert cache_tokens(served, left, None) >= CONTEXT_TOKENS
    served.context = context_of(config)
    with nullcontext() if whole else pytest.raises(OutOfMemory, match="one sequence of 131072 tokens needs"):
        cache_tokens(served, left, None)


def without_weights(folder: WorkingFolder, config: PretrainedConfig) -> str:
    """An approved base model of which there is config and tokenizer only; returns the entry's file."""
    model = folder.path / "model"
    config.save_pretrained(model)
    byte_level("<|begin|>", "<|end|>").save_pretrained(model)
    folder.edit_yaml(
        "config/rulesets/demo.yaml", lambda rules: rules["base_models"][0]["sources"].append(f"path:{model}")
    )
    file = "config/entries/demo/drago.yaml"
    folder.run("palio", "new", file, "--team", "Drago", "--base-model", f"path:{model}")
    return file


def test_a_base_model_is_described_from_config_and_tokenizer_alone(folder: WorkingFolder) -> None:
    file = without_weights(folder, LLAMA)
    folder.edit_entry("drago", lambda entry: entry["finetune"].update(method="qlora", batch_size=2))
    told = folder.run("palio", "try", file, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == [
        "check: clean",
        "base model: llama, 8.03 B parameters, 128256 tokens; context: 2048 of its 131072 tokens",
        "tokens: before a prompt <|begin|>, after an answer <|end|>",
        "qlora: 87% of the parameters are quantized",
        "qlora: 41.94 M parameters are trained",
        "training: about 32.8 GB for weights and optimizer, up to 49.3 GB for a pass of 2 rows of 2048 "
        "tokens; the track has 6 GB",
        "serving: about 32.1 GB for weights, 0.54 GB for a request of 2048 tokens; the track has 6 GB",
    ]
    assert not (folder.path / "try").exists()


@pytest.mark.parametrize(
    ("config", "recipe", "line"),
    [
        (BertConfig(vocab_size=400), {}, "bert: is an encoder"),
        (FalconConfig(vocab_size=400), {"method": "qlora"}, "leaves .* in FalconLinear as they are"),
        (GPT2Config(vocab_size=400), {"target_modules": ["lm_head"]}, "ties the weights of lm_head"),
    ],
)
def test_what_palio_cannot_train_is_refused_without_the_weights(
    folder: WorkingFolder, config: PretrainedConfig, recipe: dict[str, Any], line: str
) -> None:
    entry = load_entry(Path(without_weights(folder, config)))
    assert entry.finetune is not None
    tried = entry.model_copy(update={"finetune": FinetuneRecipe.model_validate(recipe)})
    with pytest.raises(BadInput, match=line):
        list(preview(tried, track(gpu_memory_gb=24), load_rules(Path("config/rulesets/demo.yaml"))))


def test_memory_on_a_gpu_is_that_of_quantized_weights(folder: WorkingFolder) -> None:
    entry = load_entry(Path(without_weights(folder, LLAMA)))
    recipe = FinetuneRecipe(method="qlora", batch_size=2, gradient_checkpointing=True)
    tuned = entry.model_copy(update={"finetune": recipe})
    told = list(preview(tuned, track(gpu_memory_gb=24), load_rules(Path("config/rulesets/demo.yaml"))))
    assert told[-2:] == [
        "training: about 6.4 GB for weights and optimizer, up to 5.3 GB for a pass of 2 rows of 2048 "
        "tokens; the track has 24 GB",
        "serving: about 16.1 GB for weights, 0.27 GB for a request of 2048 tokens; the track has 24 GB",
    ]


# --- the estimate ----------------------------------------------------------------------------------------

MISTRAL = Shape(hidden=4096, layers=32, vocabulary=32000)
MEASURED = Measured(
    parameters=7_241_732_096,
    trained_parameters=335_544_320,
    rows_kept=1.0,
    tokens_per_row=300,
    seconds_per_token=0.01,
    quantized=0.96,
)


def track(**fields: object) -> Track:
    return Track.model_validate({"title": "t", "ram_gb": 128, "training_budget": "24h", **fields})


def test_the_winners_recipe_fits_day_and_memory_of_its_track() -> None:
    """Birbal trained Mistral-7B by QLoRA on 200 000 rows in 16 h on a 4090 with 24 GB (FACTS, section 1)."""
    recipe = FinetuneRecipe(
        method="qlora", epochs=3, batch_size=2, gradient_accumulation=4, gradient_checkpointing=True
    )
    told = estimate(recipe, track(gpu_model="rtx4090", gpu_memory_gb=24), MEASURED, 200_000, MISTRAL)
    assert told.steps == 75_000
    assert 16 / 3 < told.training_seconds / 3600 < 16 * 3
    assert 8e9 < told.training_bytes < 24e9


@pytest.mark.parametrize(
    ("compiled", "gigabytes", "tokens_per_second"), [(False, 66.2, 13468), (True, 54.9, 17390)]
)
def test_what_an_h200_took_is_what_is_estimated(
    compiled: bool, gigabytes: float, tokens_per_second: float
) -> None:
    """benchmarks/finetune.py --device cuda --shape 7b --batch-size 16: at most 9 258 tokens a step."""
    recipe = FinetuneRecipe(max_steps=1, batch_size=16, compile_layers=compiled)
    llama = replace(MEASURED, parameters=6_738_415_616, trained_parameters=39_976_960, quantized=0.0)

    def told(tokens_per_row: float) -> Estimate:
        measured = replace(llama, tokens_per_row=tokens_per_row)
        return estimate(recipe, track(gpu_model="h200"), measured, 1000, MISTRAL)

    assert told(9258 / 16).training_seconds == pytest.approx(9258 / tokens_per_second, rel=0.15)
    # Memory is told for rows of four times the mean length.
    assert told(9258 / 64).training_bytes == pytest.approx(gigabytes * 1e9, rel=0.1)


def test_full_fine_tuning_of_seven_billion_does_not_fit() -> None:
    full = replace(MEASURED, trained_parameters=MEASURED.parameters, quantized=0.0)
    told = estimate(FinetuneRecipe(method="full"), track(gpu_model="a100"), full, 1000, MISTRAL)
    assert told.training_bytes > 40e9


def test_a_track_without_a_known_gpu_is_estimated_by_this_machines_speed() -> None:
    told = estimate(FinetuneRecipe(max_steps=10, batch_size=8), track(), MEASURED, 1000, MISTRAL)
    assert math.isclose(told.training_seconds, 10 * 8 * 300 * 0.01)
    assert told.grounds == "this machine's speed"

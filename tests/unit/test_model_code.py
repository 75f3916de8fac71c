"""A base model with code of its own, approved by the rule set: the same steps as any, in the sandbox."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen
from types import ModuleType
from typing import Any

import pytest
import requests
import torch
import yaml
from click.testing import CliRunner
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import palio
from palio import steps
from palio.base_model import fetch_base_model, source_code
from palio.cli.group import palio as palio_command
from palio.config import ApprovedModel, FinetuneRecipe, Isolation, RuleSet, Track
from palio.config import Entry as EntryFile
from palio.eligibility.check import violations
from palio.eligibility.lineage import base_model_violations
from palio.errors import BadInput, Crashed, PalioError, RuleViolation
from palio.evaluation.evaluate import Server
from palio.files import read_json_lines
from palio.layout import BaseModelFolder
from palio.model_code import approval_lines, import_code
from palio.packaging.verify import verify_package
from palio.participant.preview import preview
from palio.provenance import fingerprint, folder_sha256
from palio.records import AdapterManifest, BaseModelManifest, PackageManifest, StepFailure, read_record
from palio.sandbox.handed_in import take_model
from palio.sandbox.model_room import look
from palio.sandbox.server import ConfinedServer
from palio.settings import (
    EvaluateSettings,
    FinetuneSettings,
    RunOptions,
    StageLimits,
    StageRuns,
)
from palio.tokens import load_tokenizer
from palio.training.finetune import finetune
from palio.workflow import Workflow
from tests.support.folder import WorkingFolder
from tests.support.own_code import MODELING, SOURCES, approved, siena
from tests.support.training import Entry

StartServer = Callable[[Path], AbstractContextManager[Server]]


@pytest.fixture(scope="module")
def packaged(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    """An entry that has been trained on it, and packaged."""
    entry = Entry.create(tmp_path_factory.mktemp("results") / "t" / "e", own)
    entry.finetune(track={"cpus": 1}, epochs=1, target_modules=["value", "gate", "out"])
    entry.package()
    return entry


@pytest.fixture
def plain(packaged: Entry) -> Iterator[Any]:
    """The package as plain transformers and this test's own import of the code load it."""
    folder = packaged.folder / "package"
    name = "siena_of_the_test"
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    try:
        for stem in ("configuration_siena", "modeling_siena"):
            spec = importlib.util.spec_from_file_location(f"{name}.{stem}", folder / f"{stem}.py")
            assert spec is not None
            assert spec.loader is not None
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        yield module.SienaForCausalLM.from_pretrained(folder).eval()
    finally:
        for loaded in [key for key in sys.modules if key.startswith(name)]:
            del sys.modules[loaded]


def entry_file(path: Path, sources: int = 1, **recipe: Any) -> EntryFile:
    """An entry file whose base model is in a folder."""
    source = {"licence": "MIT", "url": "https://example.org"}
    dataset = {"sources": [{"path": f"{number}.jsonl", **source} for number in range(sources)]}
    content = {"team": "t", "track": "laptop", "base_model": {"path": str(path)}, "dataset": dataset}
    return EntryFile.model_validate(content | {"finetune": {"learning_rate": 1e-3, **recipe}})


def rules_that_approve(published: Path) -> RuleSet:
    """Rules whose second family is without code."""
    own = {"family": "S", "sources": [f"path:{published}"], "licences": ["mit"], "code": approved(published)}
    other = {"family": "O", "sources": ["path:*"], "licences": ["mit"]}
    content = {"version": "1", "data_licences": ["MIT"], "base_models": [own, other]}
    return RuleSet.model_validate(content)


# --- the whole way ---------------------------------------------------------------------------------------


def test_it_is_trained_and_the_records_say_which_code_ran(packaged: Entry) -> None:
    base = read_record(BaseModelManifest, BaseModelFolder(packaged.base).manifest)
    adapter = read_record(AdapterManifest, packaged.at.adapter_manifest)
    package = read_record(PackageManifest, packaged.at.package_manifest)
    assert base.code == approved(packaged.base / "model") != {}
    assert adapter.code == fingerprint(base.code)
    assert package.code == base.code == {name: package.files[name] for name in base.code}
    assert adapter.state == "finished"
    assert adapter.steps == adapter.planned_steps
    assert adapter.batching == "padded"  # the start-up check saw that rows end to end would mix
    assert package.served == "each sequence anew at every token"


def test_training_changed_the_model_and_the_package_has_the_change(packaged: Entry, plain: Any) -> None:
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (packaged.base / "model", packaged.folder / "package")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"blocks.{layer}.{part}.weight" for layer in (0, 1) for part in ("value", "gate", "out")
    }
    package = read_record(PackageManifest, packaged.at.package_manifest)
    assert package.max_logit_difference is not None
    assert 0 < package.max_logit_difference < 1e-3


def server_of_a_stage(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> StartServer:
    """What the step `open` starts to ask HELM's questions."""
    settings = EvaluateSettings(
        competition_id="c",
        runs=StageRuns(competition="c", stage="open", closed_store="closed", scenarios={}),
        limits=StageLimits(time_limit=60, threads=1),
        track=Track.model_validate({"title": "t", "ram_gb": 8, "cpus": 1, "training_budget": "600s"}),
        isolation=Isolation(unconfined=True),  # of teams' programs: it is confined all the same
    )
    given: list[Any] = []
    monkeypatch.setattr("palio.evaluation.evaluate.evaluate", lambda *arguments: given.extend(arguments))
    steps.evaluate(entry.at, settings, RunOptions(threads=1))
    start: StartServer = given[3]
    return start


def test_eight_answers_served_at_once_are_those_of_plain_generate(
    packaged: Entry, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packaged.folder / "package"
    prompts = [f"Say {word} {number}:" for word in ("red", "green", "blue", "white") for number in (3, 47)]

    def ask(prompt: str) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": prompt, "max_new_tokens": 12, "temperature": 0}
        reply = requests.post(f"{url}/process", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    server = server_of_a_stage(packaged, monkeypatch)(tmp_path / "log")
    assert isinstance(server, ConfinedServer)
    with server, ThreadPoolExecutor(8) as pool:
        url = server.base_url
        answers = list(pool.map(ask, prompts))
    tokenizer = load_tokenizer(folder)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = plain.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
            logprobs = plain(torch.cat([ids[0], out])[None]).logits[0].log_softmax(-1)[ids.shape[1] - 1 : -1]
        assert answer["text"] == tokenizer.decode(out, skip_special_tokens=True)
        expected = [float(row[token]) for row, token in zip(logprobs, out, strict=True)]
        found = [token["logprob"] for token in answer["tokens"]]
        assert found == pytest.approx(expected[: len(found)], abs=1e-5)


def test_verify_loads_it_in_the_sandbox_and_compares_it_with_what_was_trained(packaged: Entry) -> None:
    findings = {
        one.check: (one.state, one.why)
        for one in verify_package(packaged.folder / "package", base_models=packaged.base.parent)
    }
    assert findings["no code"][1].startswith(
        "none but configuration_siena.py, modeling_siena.py, as approved"
    )
    assert findings["loads without Palio"] == (
        "pass",
        "plain from_pretrained: 3.2 M parameters, 4 new tokens",
    )
    assert findings["is what was trained"][0] == "pass", findings["is what was trained"]
    assert "logits of base plus adapter" in findings["is what was trained"][1]
    assert not [check for check, (state, _) in findings.items() if state == "fail"]


def test_a_package_that_is_not_what_was_trained_fails_verification(packaged: Entry, tmp_path: Path) -> None:
    entry = Entry(Path(shutil.copytree(packaged.folder, tmp_path / "results/t/e")), packaged.base)
    path = entry.folder / "package" / "model.safetensors"
    weights = load_file(path)
    path.unlink()  # it may be a link
    save_file(weights | {"head.weight": 2 * weights["head.weight"]}, path, metadata={"format": "pt"})
    path.chmod(0o644)
    manifest = read_record(PackageManifest, entry.at.package_manifest)
    files = folder_sha256(entry.folder / "package")
    manifest.model_copy(update={"files": files}).write(entry.at.package_manifest)
    findings = {
        one.check: (one.state, one.why)
        for one in verify_package(entry.folder / "package", base_models=entry.base.parent)
    }
    assert findings["files"][0] == "pass"
    assert findings["is what was trained"][0] == "fail"
    assert re.match("differs from base plus adapter by", findings["is what was trained"][1])


def test_without_its_base_model_at_hand_verify_names_the_code_as_the_manifests(packaged: Entry) -> None:
    found = verify_package(packaged.folder / "package", base_models=Path("none"), load=False)
    why = next(one.why for one in found if one.check == "no code")
    assert why.endswith("modeling_siena.py, as its manifest lists; it runs in the sandbox")


def test_code_that_is_not_its_base_models_fails_verification(packaged: Entry, tmp_path: Path) -> None:
    base = BaseModelFolder(tmp_path / packaged.base.name)
    manifest = read_record(BaseModelManifest, BaseModelFolder(packaged.base).manifest)
    base.path.mkdir()
    manifest.model_copy(update={"code": {"modeling_siena.py": "0" * 64}}).write(base.manifest)
    found = verify_package(packaged.folder / "package", base_models=tmp_path, load=False)
    (failed,) = [one for one in found if one.state == "fail"]
    assert failed.check == "no code"
    assert failed.why.startswith("its code is not the base model's: configuration_siena.py: expected")


def test_its_card_says_that_loading_it_runs_code(packaged: Entry) -> None:
    card = (packaged.folder / "package" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("package", trust_remote_code=True)' in card
    assert "This runs the base model's own code, `configuration_siena.py`, `modeling_siena.py` of the" in card


@pytest.mark.slow
def test_qlora_trains_it(own: Path, tmp_path: Path) -> None:
    entry = Entry.create(tmp_path / "results" / "t" / "e", own, rows=16)
    targets = ["value", "gate", "out"]
    adapter = entry.finetune(track={"cpus": 1}, method="qlora", max_steps=2, target_modules=targets)
    assert (adapter.state, adapter.steps) == ("finished", 2)
    assert adapter.quantized is not None
    assert adapter.quantized > 0
    package = entry.package()
    assert package.divergence is not None


@pytest.mark.slow
def test_a_step_stopped_by_a_signal_resumes_from_its_checkpoint(own: Path, tmp_path: Path) -> None:
    entry = Entry.create(tmp_path / "results" / "t" / "e", own)
    recipe: dict[str, Any] = {"epochs": 100, "target_modules": ["value"], "save_steps": 100, "batch_size": 4}
    with entry.start(budget="600s", track={"cpus": 1}, **recipe) as process:
        log = entry.folder / "work" / "train"
        wait_until(process, lambda: any("step " in path.read_text() for path in log.glob("*/program.log")))
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    failure = read_record(StepFailure, entry.at.failure("finetune"))
    assert failure.state == "interrupted"
    assert failure.reason.startswith("stopped by SIGTERM at step")
    adapter = entry.finetune(track={"cpus": 1, "training_budget": "600s"}, replace=False, **recipe)
    assert (adapter.state, adapter.steps) == ("finished", adapter.planned_steps)
    (work,) = log.iterdir()
    assert "resumed from step" in (work / "program.log").read_text()
    ends = [line["outcome"] for line in read_json_lines(work / "ledger.jsonl") if line["event"] == "end"]
    assert ends == ["stopped", "finished"]


@pytest.mark.slow
def test_slurms_warning_saves_a_checkpoint_and_training_goes_on(own: Path, tmp_path: Path) -> None:
    """At any time: before the first step it changes nothing."""
    entry = Entry.create(tmp_path / "results" / "t" / "e", own)
    recipe: dict[str, Any] = {"epochs": 1000, "target_modules": ["value"], "save_steps": 10**6}
    with entry.start(budget="600s", track={"cpus": 1}, **recipe) as process:
        room = entry.folder / "work" / "train"
        wait_until(process, lambda: any(room.glob("*/program.log")))

        def is_saved() -> bool:
            process.send_signal(signal.SIGUSR1)
            saved = {path.parent.name for path in room.glob("*/program/checkpoints/*/checkpoint.json")}
            return len(saved - {"step-000001"}) > 0

        wait_until(process, is_saved)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    failure = read_record(StepFailure, entry.at.failure("finetune"))
    assert failure.reason.startswith("stopped by SIGTERM at step")


def wait_until(process: Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_full_training_keeps_the_base_models_config_and_code(own: Path, tmp_path: Path) -> None:
    entry = Entry.create(tmp_path / "results" / "t" / "e", own)
    recipe = FinetuneRecipe(learning_rate=1e-3, method="full", epochs=1)
    no_program = Isolation(output_gb=0.01)  # a checkpoint is larger
    adapter = finetune(recipe, entry.step(track={"cpus": 1}, isolation=no_program))
    config = json.loads((entry.folder / "adapter" / "config.json").read_text())
    assert config == json.loads((own / "model" / "config.json").read_text())
    assert adapter.files.keys() == {"config.json", "model.safetensors"}
    package = entry.package()
    assert package.files["model.safetensors"] == adapter.files["model.safetensors"]
    assert package.code.keys() == SOURCES.keys()


@pytest.fixture
def result(own: Path, tmp_path: Path) -> Path:
    """A whole model as a team's program leaves it, with a default of the config's class."""
    left = tmp_path / "result"
    left.mkdir()
    shutil.copy(own / "model" / "model.safetensors", left)
    config = json.loads((own / "model" / "config.json").read_text())
    (left / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    return left


def test_a_whole_model_of_a_teams_program_keeps_the_base_models_config(own: Path, result: Path) -> None:
    out = result.parent / "taken"
    found = take_model(result, out, base_model=own / "model", base_model_id="siena", limit=1 << 30)
    assert found.kind == "full"
    config, base = (json.loads((path / "config.json").read_text()) for path in (out, own / "model"))
    assert config == base


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads is 8"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "has auto_map, code of its own"),
    ],
)
def test_a_whole_model_with_another_config_is_refused(
    own: Path, result: Path, setting: dict[str, Any], why: str
) -> None:
    config = json.loads((result / "config.json").read_text())
    (result / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(RuleViolation, match=why):
        take_model(
            result, result.parent / "taken", base_model=own / "model", base_model_id="siena", limit=1 << 30
        )


# --- what is refused -------------------------------------------------------------------------------------


def test_without_approval_it_is_refused_and_the_organizer_is_told_how_to_approve(
    base_model: Path, tmp_path: Path
) -> None:
    source = siena(tmp_path / "published", base_model)
    manifest = fetch_base_model(source, tmp_path / source.id)
    assert not list((tmp_path / source.id / "model").glob("*.py"))
    assert manifest.unsupported is not None
    assert "does not know this family and needs code of its own (auto_map)" in manifest.unsupported.why
    assert "`palio model-code` prints how" in manifest.unsupported.fix


def test_what_model_code_prints_approves_the_code(base_model: Path, tmp_path: Path) -> None:
    source = siena(tmp_path / "published", base_model)
    lines = approval_lines(source_code(source))
    family = yaml.safe_load(
        "\n".join(["  - family: Siena", "    sources: ['path:*']", "    licences: [mit]", *lines])
    )
    model = ApprovedModel.model_validate(family[0])
    assert model.code == approved(tmp_path / "published")
    assert fetch_base_model(source, tmp_path / source.id, code=model.code).unsupported is None


@pytest.mark.parametrize(
    ("code", "key"),
    [
        ({"modeling.py": "0" * 63}, "modeling.py"),
        ({"../modeling.py": "0" * 64}, "modeling.py"),
        ({"modeling.so": "0" * 64}, "modeling.so"),
        ({}, "code"),
    ],
)
def test_a_rule_set_names_python_files_and_their_sha256(code: dict[str, str], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        ApprovedModel.model_validate(
            {"family": "x", "sources": ["hub:x/*"], "licences": ["mit"], "code": code}
        )


def refused(folder: Path, base_model: Path, sources: dict[str, str] = SOURCES, **config: Any) -> str:
    """Why a model of this family is refused although its code is approved."""
    source = siena(folder / "published", base_model, sources)
    path = folder / "published" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    manifest = fetch_base_model(source, folder / source.id, code=approved(folder / "published"))
    assert manifest.unsupported is not None
    return manifest.unsupported.why


def test_code_of_another_repository_is_refused(base_model: Path, tmp_path: Path) -> None:
    auto_map = {
        "AutoConfig": "configuration_siena.SienaConfig",
        "AutoModelForCausalLM": "other/repo--modeling_siena.SienaForCausalLM",
    }
    why = refused(tmp_path, base_model, auto_map=auto_map)
    assert why == (
        "auto_map.AutoModelForCausalLM: names other/repo--modeling_siena.SienaForCausalLM, "
        "code of another repository"
    )


def test_a_config_that_names_no_class_is_refused(base_model: Path, tmp_path: Path) -> None:
    why = refused(tmp_path, base_model, auto_map={"AutoConfig": "configuration_siena.SienaConfig"})
    assert why == "auto_map.AutoModelForCausalLM: names no class of a file beside it"


def test_code_that_is_not_needed_is_refused(base_model: Path, tmp_path: Path) -> None:
    assert refused(tmp_path, base_model, model_type="llama") == (
        "code: transformers knows this family, so it would not run"
    )


def test_a_tokenizer_with_code_is_refused(base_model: Path, tmp_path: Path) -> None:
    source = siena(tmp_path / "published", base_model)
    path = tmp_path / "published" / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_siena.SienaTokenizer", None]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    manifest = fetch_base_model(source, tmp_path / source.id, code=approved(tmp_path / "published"))
    assert manifest.unsupported is not None
    assert (
        "the tokenizer has code of its own (auto_map), which Palio does not run" in manifest.unsupported.why
    )


def test_code_that_lacks_a_package_is_refused_with_its_name(base_model: Path, tmp_path: Path) -> None:
    why = refused(tmp_path, base_model, SOURCES | {"modeling_siena.py": f"import einopsy{MODELING}"})
    assert "cannot be used with this transformers and these packages" in why
    assert "ModuleNotFoundError: No module named 'einopsy'" in why


def test_a_check_refuses_a_model_fetched_with_other_code_than_the_rules_approve(own: Path) -> None:
    manifest = read_record(BaseModelManifest, BaseModelFolder(own).manifest)
    entry = entry_file(own)
    assert not list(base_model_violations(manifest, entry, manifest.code))
    (withdrawn,) = base_model_violations(manifest, entry, {})
    assert withdrawn.rule == "base_model.code"
    assert "configuration_siena.py: expected sha256 none, it is not approved" in withdrawn.why
    (changed,) = base_model_violations(manifest, entry, manifest.code | {"modeling_siena.py": "0" * 64})
    assert (
        f"modeling_siena.py: expected sha256 {'0' * 64}, found {manifest.code['modeling_siena.py']}"
        in changed.why
    )


def test_a_check_refuses_it_where_vllm_serves_a_stage(own: Path) -> None:
    published = own.parent / "published"
    entry, rules = entry_file(published), rules_that_approve(published)
    assert not violations(entry, rules, tracks=("laptop",))
    (found,) = violations(entry, rules, tracks=("laptop",), vllm_stages=("open",))
    assert (found.rule, found.key) == ("base_model.engine", "base_model.path")
    assert "which vllm does not run, and vllm serves: open" in found.why
    served = entry.model_copy(update={"server": object()})
    for other in (served, entry_file(Path("elsewhere"))):
        assert not violations(other, rules, tracks=("laptop",), vllm_stages=("open",))


def test_only_entries_on_it_are_confined_for_its_code(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = WorkingFolder.create(tmp_path / "competition")
    monkeypatch.chdir(folder.path)
    folder.edit_entry("raw", lambda entry: entry.update(base_model={"path": str(own.parent / "published")}))
    workflow = Workflow(Path("config/config.yaml"))
    workflow.rules = rules_that_approve(own.parent / "published")
    found = [FinetuneSettings.of(workflow.planned(name), "finetune").isolation for name in ("raw", "curated")]
    assert found == [workflow.competition.isolation, None]


def test_the_preview_of_a_long_entry_file_is_made_in_the_sandbox(own: Path) -> None:
    published = own.parent / "published"
    entry, rules = entry_file(published, sources=3000), rules_that_approve(published)
    assert len(entry.model_dump_json()) > 128 << 10  # what an argument may have
    track = Track.model_validate({"title": "t", "ram_gb": 4, "training_budget": "600s"})
    lines = list(preview(entry, track, rules))
    assert lines[0] == "base model: its own code, in the sandbox: configuration_siena.py, modeling_siena.py"
    assert lines[1].startswith("base model: siena, 3.15 M parameters")
    assert any(line.startswith("lora: ") for line in lines)


def test_palio_serve_says_where_it_is_served(packaged: Entry) -> None:
    done = CliRunner().invoke(
        palio_command, ["serve", str(packaged.folder / "package")], catch_exceptions=True
    )
    assert isinstance(done.exception, BadInput)
    assert "runs in the sandbox of an evaluation only" in str(done.exception)


def test_its_death_in_a_look_names_no_log_that_is_gone(base_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    siena(folder, base_model, SOURCES | {"modeling_siena.py": "import os\nos._exit(3)\n"})
    with pytest.raises(Crashed) as died:
        look("examine", folder, approved(folder), weights=False)
    assert str(died.value).startswith("the process with the model's own code ended with code 3: ")
    assert "/tmp" not in str(died.value)
    assert died.value.log is None


# --- where it runs ---------------------------------------------------------------------------------------


def test_it_is_imported_in_a_room_only(own: Path) -> None:
    with pytest.raises(PalioError, match="a model's own code is imported in the sandbox only, and here"):
        import_code(own / "model", approved(own / "model"))
    assert not [name for name in sys.modules if name.startswith("palio_model_code")]


def test_transformers_is_asked_to_run_code_at_one_place_and_that_one_is_in_the_room() -> None:
    found: dict[str, list[str]] = {}
    for path in Path(palio.__file__).parent.rglob("*.py"):
        for value in re.findall(r"trust_remote_code=(\w+)", path.read_text()):
            found.setdefault(value, []).append(path.name)
    assert found.keys() == {"False", "True", "own_code"}
    assert found["own_code"] == ["verify.py"]
    assert sorted(found["True"]) == ["card.py", "model_code.py"]  # what readers are told

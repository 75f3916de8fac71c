"""Independent checks of a package: its files, that it loads without Palio, is what was trained, and fits.

    palio verify results/laptop/curated/package

The manifest is beside the folder (`package.json`) or, in a published package, in its folder palio/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from palio.config import Track
from palio.errors import BadInput, Interrupted, PalioError, RuleViolation
from palio.incoming import shard_names
from palio.layout import BaseModelFolder, EntryFolder, PublishedPackage, Resources
from palio.model_code import code_differences, named_classes, python_files, require_approved
from palio.packaging.confined import output_confined, same_answers_confined
from palio.packaging.container import PINNED
from palio.provenance import file_differences, folder_sha256
from palio.records import AdapterManifest, BaseModelManifest, PackageManifest, read_record
from palio.sandbox.model_files import check_claims, check_tokenizer, folder_tensors
from palio.sandbox.model_room import PACKAGE

RESOURCES = Resources()
NEEDED = ("config.json", "generation_config.json", "tokenizer_config.json", "README.md")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
CODE = (".py", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".so")
"""Suffixes of files that loading could execute; no package needs one."""
BATCH, CONTEXT = 8, 2048
"""Concurrent requests and tokens of each, for the memory estimate."""
LOAD_SECONDS = 900


@dataclass(frozen=True)
class Finding:
    """Outcome of a check."""

    check: str
    state: Literal["pass", "fail", "skipped"]
    why: str


class Fault(Exception):
    """A check failed; the message is the finding's `why`."""


class Skip(Exception):
    """A check could not be made; the message says why."""


def manifest_of(folder: Path) -> Path:
    """Return the path of a package's manifest, in it or beside it. Raises BadInput if there is none."""
    for path in (
        PublishedPackage(folder).manifest,
        EntryFolder.at(folder.absolute().parent).package_manifest,
    ):
        if path.is_file():
            return path
    raise BadInput(
        folder, why="no package.json in its palio/ or beside it", fix="give the folder of a package"
    )


def verify_package(
    folder: Path,
    *,
    track: Track | None = None,
    base_models: Path = RESOURCES.base_models,
    load: bool = True,
) -> list[Finding]:
    """Run all checks in order; skip those that an earlier failure makes meaningless.

    Args:
        track: its memory caps; omit to skip the check.
        base_models: folder that may hold the package's base model, to compare with base plus adapter.
        load: False to skip the checks that load the model, which take its memory.
    """
    manifest = read_record(PackageManifest, manifest_of(folder))
    checks: list[tuple[str, Callable[[], str]]] = [
        ("files", lambda: _files(folder, manifest)),
        ("no code", lambda: _no_code(folder, manifest, base_models)),
        ("weights", lambda: _weights(folder)),
        ("tokenizer", lambda: _tokenizer(folder)),
        ("complete", lambda: _complete(folder)),
        ("cards", lambda: _cards(folder, manifest)),
        ("container", lambda: _container(folder)),
        ("memory", lambda: _memory(folder, track)),
        ("loads without Palio", lambda: _loads(folder, manifest)),
        ("is what was trained", lambda: _as_trained(folder, manifest, base_models)),
    ]
    if manifest.kind == "server":  # a team's program: files, code among them
        checks = checks[:1]
    findings: list[Finding] = []
    for name, check in checks:
        if name in ("tokenizer", "loads without Palio", "is what was trained") and (
            why := _not_loaded(findings, load)
        ):
            findings.append(Finding(name, "skipped", why))
            continue
        try:
            findings.append(Finding(name, "pass", check()))
        except Fault as fault:
            findings.append(Finding(name, "fail", str(fault)))
        except Skip as reason:
            findings.append(Finding(name, "skipped", str(reason)))
    return findings


def _not_loaded(findings: list[Finding], load: bool) -> str:
    """Return why the model must not be loaded; empty if it may be."""
    first = ("files", "no code", "weights", "tokenizer")
    for finding in findings:
        if finding.state == "fail" and finding.check in first:
            return f"nothing is loaded while '{finding.check}' fails"
    return "" if load else "not requested"


def changed_files(folder: Path, manifest: PackageManifest) -> list[str]:
    """Return what is wrong with a package's files: missing, changed, or not in the manifest."""
    companions = PublishedPackage(folder).companions.name
    present = {
        path: digest
        for path, digest in folder_sha256(folder).items()
        if not path.startswith((f"{companions}/", ".cache/")) and path != ".gitattributes"  # added by the hub
    }
    return file_differences(present, manifest.files, "the manifest")


def _files(folder: Path, manifest: PackageManifest) -> str:
    if wrong := changed_files(folder, manifest):
        raise Fault("; ".join(wrong))
    for index in folder.glob("*.index.json"):
        try:
            absent = set(shard_names(index.name, index.read_bytes())) - manifest.files.keys()
        except RuleViolation as refused:
            raise Fault(str(refused)) from None
        if absent:
            raise Fault(f"{index.name} names {min(absent)!r}, which is not in the manifest")
    return f"{len(manifest.files)} files have the sha256 of the manifest"


def _no_code(folder: Path, manifest: PackageManifest, base_models: Path) -> str:
    if manifest.code:
        return _listed_code(folder, manifest, BaseModelFolder(base_models / manifest.base_model))
    if code := sorted(path.name for path in folder.iterdir() if path.suffix in CODE):
        raise Fault(f"{code[0]} could run code when loaded; hand in safetensors and configs only")
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _json(folder / name):
            raise Fault(f"{name} asks for custom code (auto_map); use a model that transformers knows")
    return "no pickles, no Python, no auto_map"


def _listed_code(folder: Path, manifest: PackageManifest, base: BaseModelFolder) -> str:
    """Check that the only code is what the manifest lists, and the base model's where that is at hand."""
    others = {*CODE} - {".py"}
    if other := sorted(path.name for path in folder.iterdir() if path.suffix in others):
        raise Fault(f"{other[0]} could run code when loaded, and is not approved")
    try:
        require_approved(manifest.code, python_files(folder))
        named_classes(folder)
    except (RuleViolation, BadInput) as refused:
        raise Fault(str(refused)) from None
    listed = "as its manifest lists"
    if base.manifest.is_file():
        approved = read_record(BaseModelManifest, base.manifest).code
        if wrong := code_differences(approved, manifest.code):
            raise Fault(f"its code is not the base model's: {'; '.join(wrong)}")
        listed = "as approved for the base model"
    return f"none but {', '.join(sorted(manifest.code))}, {listed}; it runs in the sandbox"


def _weights(folder: Path) -> str:
    """The library reads every weight file, and the config claims no more than they hold."""
    try:
        held = folder_tensors(folder)
        check_claims(_json(folder / "config.json"), held)
    except RuleViolation as refused:
        raise Fault(str(refused)) from None
    return f"{len(held)} tensors, as many layers as config.json says"


def _tokenizer(folder: Path) -> str:
    vocabulary = _number(_json(folder / "config.json"), "vocab_size")
    try:
        check_tokenizer(folder, vocabulary)
    except RuleViolation as refused:
        raise Fault(str(refused)) from None
    return "loads and encodes in seconds; its chat template ends"


def _complete(folder: Path) -> str:
    absent = [name for name in NEEDED if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        absent.append(TOKENIZERS[0])
    if not list(folder.glob("*.safetensors")):
        absent.append("model.safetensors")
    if absent:
        raise Fault(f"{', '.join(absent)} is missing; package the entry again")
    template = (folder / "chat_template.jinja").is_file() or "chat_template" in _json(
        folder / "tokenizer_config.json"
    )
    return f"weights, configs, tokenizer; {'a' if template else 'no'} chat template"


def _cards(folder: Path, manifest: PackageManifest) -> str:
    """Check that the cards name what the manifest names."""
    card = _text(folder / "README.md")
    digests = {"base model": manifest.base_model_fingerprint, "adapter": manifest.adapter_fingerprint}
    for name, digest in digests.items():
        if digest and digest not in card:
            raise Fault(f"README.md does not name the {name} of the manifest ({digest[:12]}…)")
    if manifest.adapter_fingerprint and not (folder / "DATA_CARD.md").is_file():
        raise Fault("DATA_CARD.md is missing: nobody can tell what the model was trained on")
    return "the cards match the manifest"


def _container(folder: Path) -> str:
    container = PublishedPackage(folder).container
    if not container.is_dir():
        raise Skip("the package has no container; publishing adds one")
    if not PINNED.search(_text(container / "Containerfile")):
        raise Fault("the base image in Containerfile has no sha256 digest")
    loose = [line for line in _text(container / "requirements.lock").split() if "==" not in line]
    if loose:
        raise Fault(f"requirements.lock does not pin {loose[0]}")
    return "image pinned by digest, Python packages by version"


def _memory(folder: Path, track: Track | None) -> str:
    needed = serving_bytes(folder)
    if track is None:
        raise Skip(f"needs about {needed / 1e9:.1f} GB to serve; no track given")
    cap = track.gpu_memory_gb or track.ram_gb
    where = "GPU memory" if track.gpu_memory_gb else "memory"
    if needed > cap * 1e9:
        raise Fault(f"needs about {needed / 1e9:.1f} GB to serve, the track has {cap:g} GB of {where}")
    return f"needs about {needed / 1e9:.1f} GB of the track's {cap:g} GB of {where}"


def serving_bytes(folder: Path) -> int:
    """Estimate the memory of weights, and of keys and values of BATCH requests of CONTEXT tokens."""
    config = _json(folder / "config.json")
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    layers = _number(config, "num_hidden_layers", "n_layer")
    heads = _number(config, "num_attention_heads", "n_head")
    hidden = _number(config, "hidden_size", "n_embd")
    kv_heads = _number(config, "num_key_value_heads") or heads
    head_size = _number(config, "head_dim") or (hidden // heads if heads else 0)
    width = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    return weights + 2 * layers * kv_heads * head_size * width * BATCH * CONTEXT


_NO_CODE = """
import sys
folder, own_code = sys.argv[1], False
"""
_OWN_CODE = """
import hashlib, json, socket, sys
from pathlib import Path
assert socket.gethostname() == "entry", "a model's own code is run in the sandbox only"
package, copy, approved = Path(sys.argv[1]), Path("/tmp/package"), json.loads(sys.argv[2])
copy.mkdir()
for path in package.iterdir():
    if path.suffix in (".json", ".py"):
        (copy / path.name).write_bytes(path.read_bytes())
    else:
        (copy / path.name).symlink_to(path)
found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in copy.glob("*.py")}
assert found == approved, "the code is not the approved one"
folder, own_code = str(copy), True
"""
"""Only here transformers is asked to run a model's code: a copy that nobody outside the room can change."""
_LOADER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own_code, use_safetensors=True).eval()
with torch.inference_mode():
    prompt = tokenizer("The capital of Italy is", return_tensors="pt")
    finite = bool(model(**prompt).logits.isfinite().all())
    new = model.generate(**prompt, max_new_tokens=4, do_sample=False)
print(json.dumps({
    "parameters": sum(parameter.numel() for parameter in model.parameters()),
    "finite": finite,
    "new": new.shape[1] - prompt["input_ids"].shape[1],
    "ours": sorted(name for name in sys.modules if name.split(".")[0] in ("palio", "peft")),
}))
"""


def _loads(folder: Path, manifest: PackageManifest) -> str:
    """Load the package in a separate process without our code, a network or the caller's variables; in a room
    if it has code of its own."""
    if manifest.code:
        line = (sys.executable, "-I", "-c", _OWN_CODE + _LOADER, PACKAGE, json.dumps(manifest.code))
        with _in_a_room():
            code, output = output_confined(line, folder, LOAD_SECONDS)
        return _loaded(code, output, output)
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.environ.get("PATH", ""), "HOME": home, "HF_HUB_OFFLINE": "1"}
        for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"):
            if name in os.environ:
                environment[name] = os.environ[name]
        command = [sys.executable, "-I", "-c", _NO_CODE + _LOADER, str(folder.resolve())]
        try:
            done = subprocess.run(
                command, env=environment, cwd=home, capture_output=True, text=True, timeout=LOAD_SECONDS,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Fault(f"did not load and answer within {LOAD_SECONDS} s") from None
    return _loaded(done.returncode, done.stdout, done.stderr)


@contextmanager
def _in_a_room() -> Iterator[None]:
    """Make an error of a room the finding: the package's fault, unless this machine cannot check it."""
    try:
        yield
    except PalioError as error:
        of_the_machine = type(error) in (PalioError, Interrupted)
        raise (Skip if of_the_machine else Fault)(str(error)) from None


def _loaded(code: int | None, output: str, errors: str) -> str:
    """Return what the loader says. Raises Fault if it failed."""
    if code != 0:
        last = errors.strip().splitlines()[-1:] or [f"exited with code {code}"]
        raise Fault(f"from_pretrained fails: {last[0]:.300}")
    try:
        result = json.loads(output.splitlines()[-1])
        parameters, new = int(result["parameters"]), int(result["new"])
    except (IndexError, ValueError, TypeError, KeyError):  # the model's own code may print and do anything
        raise Fault("the process that loaded it does not say what it loaded") from None
    if result["ours"]:
        raise Fault(f"loading it imports {result['ours'][0]}")
    if not result["finite"]:
        raise Fault("its logits are not finite")
    return f"plain from_pretrained: {parameters / 1e6:.1f} M parameters, {new} new tokens"


def _as_trained(folder: Path, manifest: PackageManifest, base_models: Path) -> str:
    """Compare the package with base model plus adapter, where both are available."""
    base = BaseModelFolder(base_models / manifest.base_model)
    entry = EntryFolder.at(folder.absolute().parent)
    if not base.manifest.is_file():
        raise Skip(f"base model {manifest.base_model} is not in {base_models}")
    if read_record(BaseModelManifest, base.manifest).fingerprint != manifest.base_model_fingerprint:
        raise Fault(f"{base.path} is not the base model of the manifest")
    if manifest.adapter_fingerprint is None:
        return _same_weights(folder, base.model)
    if not entry.adapter_manifest.is_file():
        raise Skip("the adapter is not beside the package")
    trained = read_record(AdapterManifest, entry.adapter_manifest)
    if trained.fingerprint != manifest.adapter_fingerprint:
        raise Fault("the adapter beside it is not the manifest's")
    if folder_sha256(entry.adapter) != trained.files:
        raise Fault("the adapter beside it differs from adapter.json")
    if trained.recipe["method"] == "full":
        return _same_weights(folder, entry.adapter)
    if manifest.code:
        with _in_a_room():
            return same_answers_confined(folder, base, entry.adapter, trained)
    return same_answers(folder, base.model, entry.adapter, trained)


def _same_weights(folder: Path, other: Path) -> str:
    from palio.base_model import weight_files

    ours, theirs = folder_sha256(folder), folder_sha256(other)
    for name in weight_files(other):
        if ours.get(name) != theirs[name]:
            raise Fault(f"{name} differs from that of {other}")
    return "its weights are those it was made from, byte for byte"


def same_answers(folder: Path, base: Path, adapter: Path, trained: AdapterManifest) -> str:
    from palio.packaging.package import (
        DIVERGENCE,
        adapted_model,
        largest_difference,
        probe_logits,
        rounding_bound,
    )
    from palio.tensors import load_causal_model, mean_divergence
    from palio.tokens import load_tokenizer

    tokenizer = load_tokenizer(folder)
    package = load_causal_model(folder)
    exact = package.dtype.is_floating_point and package.dtype.itemsize == 4
    ours = probe_logits(package, tokenizer)
    adapted, as_trained = adapted_model(base, adapter, trained)
    reference = probe_logits(adapted, tokenizer) if as_trained is None else as_trained
    if exact and as_trained is None:
        difference = largest_difference(ours, reference)
        bound = rounding_bound(adapted, tokenizer, reference)
        if not difference <= bound:
            raise Fault(f"differs from base plus adapter by {difference:.2g} in a logit, not {bound:.2g}")
        return f"logits of base plus adapter within {difference:.1g}"
    divergence = mean_divergence(reference, ours)
    if not divergence <= DIVERGENCE:
        raise Fault(f"diverges from the trained model by {divergence:.2g} nats, not {DIVERGENCE:g}")
    return f"diverges from the trained model by {divergence:.1g} nats"


# --- reading -----------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise Fault(f"{path.name} is missing or not text") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except ValueError:
        raise Fault(f"{path.name} is not JSON") from None
    return content if isinstance(content, dict) else {}


def _number(config: dict[str, Any], *names: str) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def findings_lines(findings: list[Finding]) -> Iterator[str]:
    """Yield a line per finding, for a terminal."""
    for finding in findings:
        yield f"{finding.state:8} {finding.check}: {finding.why}"

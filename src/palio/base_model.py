"""Base models: fetched once, as a plain safetensors folder with the hash of every file in its manifest.

    resources/base_models/<id>/
        model/           config.json, *.safetensors, tokenizer files
        manifest.json    BaseModelManifest, written last: if it exists, the folder is complete

Sources: `hub` (a snapshot of the Hugging Face hub at a revision), `path` (a folder) and `gguf` (a GGUF file
in an installed Python package, dequantized once to fp32 safetensors). A model that has pickled weights alone
is converted in a sandbox. Pickled weights beside safetensors, and Python code that no rule set approves, are
not even downloaded.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from palio.config import REVISION_PATTERN, BaseModelSource, expand
from palio.errors import BadInput, Crashed
from palio.files import let_others_read, link_or_copy
from palio.incoming import shard_names
from palio.layout import BaseModelFolder, Resources
from palio.model_code import named_classes, python_files, take_code
from palio.provenance import file_sha256, folder_sha256
from palio.records import BaseModelManifest, Layers, Unsupported, read_record

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "README.md")
"""Name patterns of a model's files: weights, configs, tokenizer, license. Not *.bin, *.pt, *.py."""

CONFIGS = tuple(pattern for pattern in WANTED if pattern != "*.safetensors")

PICKLES = ("pytorch_model*.bin",)
"""Weights of a model that has no others."""

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
"""Weights in one file; those of several are named by an index."""

CODE = ("*.py",)
"""The model's own code, if it is approved."""

HUB_SECONDS = 10.0
"""The hub's time to answer whether it has a model."""
MAX_CARD = 1 << 20
"""Characters of a model card that are read."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_base_model(
    source: BaseModelSource, out: Path, *, code: Mapping[str, str] | None = None, offline: bool = False
) -> BaseModelManifest:
    """Make `out/model` and `out/manifest.json` from `source`, unless they are already complete.

    Args:
        code: sha256 by name of the model's own Python files, if the rule set approves them.
        offline: do not use the network: a hub model must be in the local hub cache.

    Raises BadInput if the source is missing or unusable, RuleViolation if pickled weights are no weights or
    the code is not the approved one, Crashed if a download fails or is damaged, or pickled weights cannot be
    converted on this machine.
    """
    code = dict(code or {})
    folder = BaseModelFolder(out)
    manifest_path, model = folder.manifest, folder.model
    if manifest_path.is_file():
        known = read_record(BaseModelManifest, manifest_path)
        same = (known.source, known.code) == (source, code)
        if same and model.is_dir() and folder_sha256(model) == known.files:
            return known
        manifest_path.unlink()
    building = out / "model.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    pickled: dict[str, str] = {}
    if source.gguf:
        _convert_gguf(source.gguf, building)
    else:
        given = _hub_snapshot(source.hub, offline, code) if source.hub else _given_folder(source)
        pickled = _take_files(given, building, source.kind, source.hub or source.path or "")
        if code:
            take_code(given, building, code)
    found = _examined(building, code)
    let_others_read(building)
    shutil.rmtree(model, ignore_errors=True)
    building.rename(model)
    manifest = BaseModelManifest(
        id=source.id,
        source=source,
        files=folder_sha256(model),
        pickled=pickled,
        code=code,
        unsupported=found if isinstance(found, Unsupported) else None,
        layers=found if isinstance(found, Layers) else None,
    )
    manifest.write(manifest_path)
    return manifest


def _examined(folder: Path, code: Mapping[str, str]) -> Layers | Unsupported:
    """Complete the tokenizer; return what `palio.causal_model.examine` finds, or the fault of the files."""
    from palio.tokens import complete_tokenizer

    try:
        complete_tokenizer(folder)
        return _layers(folder, code)
    except BadInput as error:  # a team's own server may read it its own way
        return Unsupported(why=f"{error.key}: {error.why}", fix=error.fix)


def _layers(folder: Path, code: Mapping[str, str]) -> Layers | Unsupported:
    """Return what `palio.causal_model.examine` finds; with code of the model's own, in a sandbox.

    Raises BadInput if that code is not needed or names no causal language model, Crashed if this machine
    cannot confine it.
    """
    from palio.causal_model import examine, is_known

    if not code:
        return examine(folder)
    if is_known(folder):
        why, fix = "transformers knows this family, so it would not run", "remove it from the rule set"
        raise BadInput("base_model", "code", why=why, fix=fix)
    named_classes(folder)
    from palio.sandbox.model_room import look

    try:
        found = look("examine", folder, code, weights=True)
        return (Unsupported if "why" in found else Layers).model_validate(found)
    except (TypeError, ValidationError):
        raise Crashed("the process with the model's own code did not report what the model is") from None


def source_code(source: BaseModelSource) -> dict[str, bytes]:
    """Return the content of a base model's own Python files by name; none is run.

    Raises BadInput if the model is missing or has none, Crashed if a download fails.
    """
    folder = _hub_download(source.hub, CODE) if source.hub else _given_folder(source)
    if not (sources := python_files(folder)):
        raise BadInput("base_model", source.kind, source.address, why="brings no Python file")
    return sources


def fetch_configs(source: BaseModelSource, out: Path, code: Mapping[str, str] | None = None) -> None:
    """Put a base model's config and tokenizer into the folder `out`: all but its weights.

    Its Python files too, if they are those approved in `code`, sha256 by name.

    Raises as `fetch_base_model` does.
    """
    from palio.tokens import complete_tokenizer

    if source.gguf:
        _gguf_configs(*_gguf_file(source.gguf), out)
        return
    if source.hub:
        require_on_hub(source.hub)
    wanted = (*CONFIGS, *CODE) if code else CONFIGS
    folder = _hub_download(source.hub, wanted) if source.hub else expand(source.path or "")
    if not (folder / "config.json").is_file():
        why, fix = "has no config.json", "give a model in Hugging Face format"
        raise BadInput("base_model", source.kind, source.hub or source.path, why=why, fix=fix)
    for path in folder.iterdir():
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in CONFIGS):
            link_or_copy(path.resolve(), out / path.name)
    if code:
        take_code(folder, out, code)
    complete_tokenizer(out)


def weight_files(folder: Path, whole: str = SAFE) -> list[str]:
    """Return the names of the files that hold a folder's weights; empty if one of them is absent.

    `whole` is the name that a single file has.

    Raises RuleViolation if the index names a file elsewhere.
    """
    index = folder / f"{whole}.index.json"
    names = shard_names(index, index.read_bytes()) if index.is_file() else [whole]
    return names if all((folder / name).is_file() for name in names) else []


def card_facts(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's model card: the YAML between its first two lines of dashes.

    Empty if there is no card or it cannot be parsed: its text is untrusted.
    """
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as stream:
            text = stream.read(MAX_CARD)
        content = yaml.safe_load(text[4:].partition("\n---")[0]) if text.startswith("---\n") else {}
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _given_folder(source: BaseModelSource) -> Path:
    """Return the folder of a source that is not on the hub. Raises BadInput if it has none."""
    if source.path and (given := expand(source.path)).is_dir():
        return given
    value = source.path or source.gguf
    raise BadInput("base_model", source.kind, value, why="no such folder", fix="correct the path")


def _take_files(folder: Path, target: Path, key: str, value: str) -> dict[str, str]:
    """Hard-link the model's files into `target`, or copy them across file systems; convert pickled weights.

    Hard links take no space and outlive a cleared hub cache; a later change through the other name shows in
    the hash.

    Returns the sha256 by name of pickled weights.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(
            "base_model", key, value, why="has no config.json", fix="give a model in Hugging Face format"
        )
    weights = weight_files(folder)
    pickled = [] if weights else weight_files(folder, PICKLED)
    if not weights and not pickled:
        why = f"has no complete weights ({SAFE} or {PICKLED}, or all files of an index)"
        raise BadInput("base_model", key, value, why=why, fix="give the whole model")
    for path in sorted(folder.iterdir()):
        wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in WANTED)
        # Consolidated or duplicate weights beside the indexed ones are not needed.
        if not path.is_file() or not wanted or (path.suffix == ".safetensors" and path.name not in weights):
            continue
        link_or_copy(path.resolve(), target / path.name)
        _check_announced(path, value)
    for name in pickled:
        _check_announced(folder / name, value)
    if pickled:
        from palio.sandbox.pickled import convert

        convert([folder / name for name in pickled], target)
        (target / f"{PICKLED}.index.json").unlink(missing_ok=True)
    return {name: file_sha256(folder / name) for name in pickled}


def _check_announced(path: Path, value: str) -> None:
    """Compare a file with the sha256 that the hub announced, which its cache names a large file by."""
    real = path.resolve()
    if _SHA256.fullmatch(real.name) and file_sha256(real) != real.name:
        raise Crashed(f"base model {value}: {path.name} is damaged; delete {real} and fetch it again")


def require_on_hub(address: str) -> None:
    """Check in seconds that a model of the hub can be fetched, which tries for minutes.

    Raises:
        BadInput: it is not in the local hub cache, and the hub has it not, does not answer, or gives it only
            to those who accepted its terms.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = address.partition("@")
    with suppress(errors.LocalEntryNotFoundError, FileNotFoundError):
        huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=WANTED, local_files_only=True
        )
        return
    folder = Resources().base_models
    fix = f"connect to the network, or bring {folder} from a machine that has fetched it"
    why = "is not on this machine, and the hub does not answer"
    _ask_hub(address, why=why, fix=fix)
    try:
        huggingface_hub.auth_check(repo)
    except errors.GatedRepoError:
        raise _gated(address) from None
    except errors.RepositoryNotFoundError:
        raise _unknown_to_hub(address) from None
    except (errors.HTTPError, OSError):
        raise BadInput("base_model", "hub", address, why=why, fix=fix) from None


def commit_on_hub(address: str) -> str:
    """Return the commit id that `org/name` or `org/name@branch` has on the hub now.

    Raises:
        BadInput: the hub has it not or does not answer.
    """
    fix = "connect to the network, or write the commit: org/name@<40 characters>"
    return _ask_hub(address, why="names no commit, and the hub does not answer", fix=fix)


def _ask_hub(address: str, *, why: str, fix: str) -> str:
    """Return a model's commit id; `why` and `fix` are for a hub that does not answer."""
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = address.partition("@")
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision or None, timeout=HUB_SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise _unknown_to_hub(address) from None
    except (errors.HTTPError, OSError):  # the base of all that its HTTP library raises
        raise BadInput("base_model", "hub", address, why=why, fix=fix) from None
    return str(info.sha)


def _unknown_to_hub(address: str) -> BadInput:
    why = "the hub has no such model or revision, or it asks for a login"
    return BadInput("base_model", "hub", address, why=why, fix="correct it or set HF_TOKEN")


def _gated(address: str) -> BadInput:
    repo = address.partition("@")[0]
    why = "the hub gives it only to those who accepted its terms"
    fix = f"accept them at https://huggingface.co/{repo} and set that user's HF_TOKEN"
    return BadInput("base_model", "hub", address, why=why, fix=fix)


def _hub_snapshot(address: str, offline: bool, code: Mapping[str, str]) -> Path:
    """Return the snapshot's folder in the local hub cache, after a download if it is incomplete.

    Python files are downloaded if `code`, their approved names and sha256, has any.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = address.partition("@")
    wanted = (*WANTED, *CODE) if code else WANTED
    try:
        cached = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision or None, allow_patterns=wanted, local_files_only=True
            )
        )
        if offline or (
            REVISION_PATTERN.fullmatch(revision)
            and (cached / "config.json").is_file()
            and (weight_files(cached) or weight_files(cached, PICKLED))
            and all((cached / name).is_file() for name in code)
        ):
            return cached
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        if offline:
            why, fix = "is not in the local hub cache", "fetch it once with a network, or give `path`"
            raise BadInput("base_model", "hub", address, why=why, fix=fix) from None
    fetched = _hub_download(address, wanted)
    return fetched if weight_files(fetched) else _hub_download(address, PICKLES)


def _hub_download(address: str, patterns: tuple[str, ...]) -> Path:
    """Download a model's files with such names; return the snapshot's folder in the local hub cache."""
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = address.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
        )
    except errors.GatedRepoError:
        raise _gated(address) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise _unknown_to_hub(address) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise Crashed(f"base model {address}: the download failed ({cause}); try again") from None


def _gguf_file(address: str) -> tuple[Path, str]:
    """Return the folder and the name of a GGUF file in an installed package."""
    package, _, name = address.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        why, fix = f"the Python package {package} is not installed", "install it"
        raise BadInput("base_model", "gguf", address, why=why, fix=fix)
    folder = Path(spec.origin).parent
    if not (folder / name).is_file():
        held = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no GGUF file"
        raise BadInput("base_model", "gguf", address, why="no such file", fix=f"{package} has {held}")
    return folder, name


def _gguf_configs(folder: Path, name: str, target: Path) -> Any:
    """Save a GGUF file's config, without what says that it is quantized, and tokenizer; return the config."""
    from transformers import AutoConfig, AutoTokenizer

    read = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    settings: dict[str, Any] = read.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    config = type(read)(**settings)
    config.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False).save_pretrained(target)
    return config


def _convert_gguf(address: str, target: Path) -> None:
    """Dequantize a GGUF file to fp32 safetensors.

    A model loaded from GGUF cannot be saved (transformers considers it quantized), so its weights are moved
    into a fresh model with a cleaned config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder, name = _gguf_file(address)
    read = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False
    )
    config = _gguf_configs(folder, name, target)
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing = fresh.load_state_dict(read.state_dict(), strict=False).missing_keys
    tied = set(getattr(fresh, "_tied_weights_keys", None) or ())
    if set(missing) - tied:
        raise Crashed(f"base model {address}: the GGUF file lacks {sorted(set(missing) - tied)[0]}")
    fresh.tie_weights()
    fresh.save_pretrained(target)

"""Base models: fetched once, as a plain safetensors folder with the hash of every file in its manifest.

    resources/base_models/<id>/
        model/           config.json, *.safetensors, tokenizer files
        manifest.json    BaseModelManifest, written last: if it exists, the folder is complete

Sources: `hub` (a snapshot of the Hugging Face hub at a revision), `path` (a folder) and `gguf` (a GGUF file
in an installed Python package, dequantized once to fp32 safetensors). Pickled weights and Python code beside
the weights are never downloaded, linked or opened.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from palio.config import REVISION_PATTERN, BaseModelSource, expand
from palio.errors import BadInput, Crashed
from palio.files import link_or_copy
from palio.incoming import shard_names
from palio.layout import BaseModelFolder, Resources
from palio.provenance import file_sha256, folder_sha256
from palio.records import BaseModelManifest, Layers, Unsupported, read_record

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "README.md")
"""Name patterns of a model's files: weights, configs, tokenizer, license. Not *.bin, *.pt, *.py."""

HUB_SECONDS = 10.0
"""The hub's time to answer whether it has a model."""
MAX_CARD = 1 << 20
"""Characters of a model card that are read."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_base_model(source: BaseModelSource, out: Path, *, offline: bool = False) -> BaseModelManifest:
    """Make `out/model` and `out/manifest.json` from `source`, unless they are already complete.

    With `offline` the network is not used: a hub model must be in the local hub cache.

    Raises BadInput if the source is missing or unusable, Crashed if a download fails or is damaged.
    """
    folder = BaseModelFolder(out)
    manifest_path, model = folder.manifest, folder.model
    if manifest_path.is_file():
        known = read_record(BaseModelManifest, manifest_path)
        if known.source == source and model.is_dir() and folder_sha256(model) == known.files:
            return known
        manifest_path.unlink()
    building = out / "model.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    if source.gguf:
        _convert_gguf(source.gguf, building)
    elif source.hub:
        _take_files(_hub_snapshot(source.hub, offline), building, "hub", source.hub)
    elif source.path:
        given = expand(source.path)
        if not given.is_dir():
            raise BadInput("base_model", "path", source.path, why="no such folder", fix="correct the path")
        _take_files(given, building, "path", source.path)
    from palio.causal_model import examine
    from palio.tokens import complete_tokenizer

    try:
        complete_tokenizer(building)
        found = examine(building)
    except BadInput as error:  # a team's own server may read it its own way
        found = Unsupported(why=f"{error.key}: {error.why}", fix=error.fix)
    for path in building.iterdir():
        if path.stat().st_nlink == 1:
            path.chmod(0o644)  # weights are saved as 0600, which other users' jobs could not read
    shutil.rmtree(model, ignore_errors=True)
    building.rename(model)
    manifest = BaseModelManifest(
        id=source.id,
        source=source,
        files=folder_sha256(model),
        unsupported=found if isinstance(found, Unsupported) else None,
        layers=found if isinstance(found, Layers) else None,
    )
    manifest.write(manifest_path)
    return manifest


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold the model of `folder`; empty if one of them is absent.

    Raises RuleViolation if its index names a file elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    names = shard_names(index, index.read_bytes()) if index.is_file() else ["model.safetensors"]
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


def _take_files(folder: Path, target: Path, key: str, value: str) -> None:
    """Hard-link the model's files into `target`, or copy them across file systems.

    Hard links take no space and outlive a cleared hub cache; a later change through the other name shows in
    the hash.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(
            "base_model", key, value, why="has no config.json", fix="give a model in Hugging Face format"
        )
    weights = weight_files(folder)
    if not weights:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        held = f" (it has {pickled[0]}: pickled weights are refused)" if pickled else ""
        raise BadInput(
            "base_model",
            key,
            value,
            why=f"has no complete safetensors weights{held}",
            fix="give a safetensors model",
        )
    for path in sorted(folder.iterdir()):
        wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in WANTED)
        # Consolidated or duplicate weights beside the indexed ones are not needed.
        if not path.is_file() or not wanted or (path.suffix == ".safetensors" and path.name not in weights):
            continue
        real = path.resolve()
        link_or_copy(real, target / path.name)
        # The hub's cache names a large file by the sha256 that the hub announced.
        if _SHA256.fullmatch(real.name) and file_sha256(target / path.name) != real.name:
            raise Crashed(f"base model {value}: {path.name} is damaged; delete {real} and fetch it again")


def require_on_hub(address: str) -> None:
    """Check, before anything is started, that a model of the hub can be fetched.

    Raises:
        BadInput: it is not in the local hub cache, and the hub has it not or does not answer.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = address.partition("@")
    with suppress(errors.LocalEntryNotFoundError, FileNotFoundError):
        huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=WANTED, local_files_only=True
        )
        return
    try:
        huggingface_hub.HfApi().model_info(repo, revision=revision or None, timeout=HUB_SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise _unknown_to_hub(address) from None
    except (errors.HTTPError, OSError):  # the base of all that its HTTP library raises
        why = "is not on this machine, and the hub does not answer"
        folder = Resources().base_models
        fix = f"connect to the network, or bring {folder} from a machine that has fetched it"
        raise BadInput("base_model", "hub", address, why=why, fix=fix) from None


def _unknown_to_hub(address: str) -> BadInput:
    why = "the hub has no such model or revision, or it asks for a login"
    return BadInput("base_model", "hub", address, why=why, fix="correct it or set HF_TOKEN")


def _hub_snapshot(address: str, offline: bool) -> Path:
    """Return the snapshot's folder in the local hub cache, after a download if it is incomplete."""
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = address.partition("@")
    request = {"revision": revision or None, "allow_patterns": WANTED}
    try:
        cached = Path(huggingface_hub.snapshot_download(repo, local_files_only=True, **request))
        if offline or (
            REVISION_PATTERN.fullmatch(revision)
            and (cached / "config.json").is_file()
            and weight_files(cached)
        ):
            return cached
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        if offline:
            why, fix = "is not in the local hub cache", "fetch it once with a network, or give `path`"
            raise BadInput("base_model", "hub", address, why=why, fix=fix) from None
    try:
        return Path(huggingface_hub.snapshot_download(repo, **request))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise _unknown_to_hub(address) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise Crashed(f"base model {address}: the download failed ({cause}); try again") from None


def _convert_gguf(address: str, target: Path) -> None:
    """Dequantize a GGUF file to fp32 safetensors.

    A model loaded from GGUF cannot be saved (transformers considers it quantized), so its weights are moved
    into a fresh model with a cleaned config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package, _, name = address.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        why, fix = f"the Python package {package} is not installed", "install it"
        raise BadInput("base_model", "gguf", address, why=why, fix=fix)
    folder = Path(spec.origin).parent
    if not (folder / name).is_file():
        held = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no GGUF file"
        raise BadInput("base_model", "gguf", address, why="no such file", fix=f"{package} has {held}")
    read = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False
    )
    settings: dict[str, Any] = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    fresh = AutoModelForCausalLM.from_config(type(read.config)(**settings), dtype=torch.float32)
    missing = fresh.load_state_dict(read.state_dict(), strict=False).missing_keys
    tied = set(getattr(fresh, "_tied_weights_keys", None) or ())
    if set(missing) - tied:
        raise Crashed(f"base model {address}: the GGUF file lacks {sorted(set(missing) - tied)[0]}")
    fresh.tie_weights()
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False).save_pretrained(target)

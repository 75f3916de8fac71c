"""Files that come from a team. Nothing of them is trusted: a link is not followed, a pickle is not opened,
code is not taken, and a weight file must be what its name says.

    take_files     a team's folder or image, as a copy that its program is shown
    take_model     what a training program left, into a folder of ours: a model, an adapter, or several
    take_weights   the weights that a model with code of its own left, likewise
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from palio.config import ID_PATTERN
from palio.credentials import FIX, credentials_in
from palio.errors import BadInput, RuleViolation
from palio.incoming import INDEX_BYTES, Incoming, copy_files, shard_names
from palio.provenance import write_json
from palio.sandbox.model_files import (
    ADAPTER,
    CONFIG,
    GENERATION,
    Tensors,
    adapter_settings,
    check_adapter,
    check_tokenizer,
    check_weights,
    folder_tensors,
    generation_config,
    model_config,
    tensors,
    with_dtype,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES_LIMIT = 100_000
ADAPTERS_LIMIT = 64
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"})


def _is_taken(name: str) -> bool:
    """True for weights, the configs, and the files of a tokenizer."""
    return name in (CONFIG, ADAPTER, GENERATION, *TOKENIZER) or name.endswith((".safetensors", ".model"))


def take_files(path: str, key: str, target: Path, *, roots: Sequence[str], limit: int) -> Path:
    """Copy a team's folder, or its image, to `target`, which is shown to its program: what the team changes
    later changes nothing.

    Args:
        key: its place in the entry file.
        roots: the rule set's `team_folders`; without them only a link in the folder, or in place of it, is
            refused.
        limit: bytes.

    Raises:
        BadInput: there is no such folder or image.
        RuleViolation: it is outside the roots, too large, a link, or holds a credential or anything but
            files and folders.
    """
    given = Incoming.locate(Path(path), [Path(root) for root in roots])
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True) if target.is_file() else None
    try:
        for file, found in credentials_in(given):
            raise RuleViolation(f"{file}: {found.why}", FIX)
        if not given.is_folder():
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_files([given], target.parent, limit, name=target.name)
            return target
        files = list(given.files())
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput("entry", key, path, why="no such file or folder", fix="correct the path") from None
    if len(files) > FILES_LIMIT:
        raise RuleViolation(f"{given} holds {len(files)} files, more than {FILES_LIMIT}", "pack them")
    target.mkdir(parents=True)
    left = limit
    for file in files:
        inside = target / PurePosixPath(file.name).relative_to(given.name)
        inside.parent.mkdir(parents=True, exist_ok=True)
        left -= copy_files([file], inside.parent, left)
    return target


class HandedIn(NamedTuple):
    """What a training program left."""

    kind: Literal["lora", "full"]
    pickles: list[str]
    """Names of pickles, which were not taken."""
    adapters: tuple[str, ...] = ()
    """Folders of the adapters, if it left several."""


def take_model(left: Path, out: Path, *, base_model: Path, base_model_id: str, limit: int) -> HandedIn:
    """Copy an adapter or a model out of the folder a program left, or several adapters, each in a folder of
    its own.

    Other files are left where they are: checkpoints, logs. The index of a sharded model is written anew.

    Raises RuleViolation if there is neither, if it has more than `limit` bytes, or holds what Palio does not
    load.
    """
    result = Incoming(left.parent, left.name)
    names = _names(result)
    shutil.rmtree(out, ignore_errors=True)
    take = partial(_take, base_model=base_model, base_model_id=base_model_id)
    if ADAPTER in names or CONFIG in names:
        return HandedIn(*take(result, names, out, limit)[:2])
    adapters = {name: found for name in names if ADAPTER in (found := _names(result / name))}
    if not adapters:
        raise RuleViolation(
            f"the program left neither adapter_config.json nor config.json in its result: {_some(names)}"
        )
    if len(adapters) > ADAPTERS_LIMIT or not all(map(ID_PATTERN.fullmatch, adapters)):
        why = f"the program left {len(adapters)} adapters: {_some(list(adapters))}"
        fix = f"leave at most {ADAPTERS_LIMIT}, in folders named by letters, digits, - and _"
        raise RuleViolation(why, fix)
    pickles = []
    for name, found in adapters.items():
        try:
            _, beside, size = take(result / name, found, out / name, limit)
        except RuleViolation as fault:
            raise RuleViolation(f"adapter {name}: {fault.why}", fault.fix) from None
        limit -= size
        pickles += [f"{name}/{pickle}" for pickle in beside]
    return HandedIn("lora", pickles, tuple(adapters))


def _names(folder: Incoming) -> list[str]:
    try:
        return folder.names()
    except (FileNotFoundError, NotADirectoryError):
        return []


def _take(
    result: Incoming, names: list[str], out: Path, limit: int, *, base_model: Path, base_model_id: str
) -> tuple[Literal["lora", "full"], list[str], int]:
    """Copy one adapter or model: which of the two it is, the pickles beside it, and the bytes copied."""
    kind: Literal["lora", "full"] = "lora" if ADAPTER in names else "full"
    out.mkdir(parents=True)
    size = copy_files(_taken(result, names, sharded=kind == "full" and WEIGHTS not in names), out, limit)
    weights = sorted(out.glob("*.safetensors"))
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if not weights:
        found = f"{_some(pickles)}: a pickle runs code when it is opened" if pickles else _some(names)
        raise RuleViolation(f"the result has no .safetensors weights but {found}; save safetensors")
    held = {path: tensors(path) for path in weights}
    base = _json(base_model / CONFIG)
    for path in sorted(out.glob("*.json")):
        content = _json(path)
        named = content.get("auto_map") if isinstance(content, dict) else None
        if named and (path.name != CONFIG or named != base.get("auto_map")):
            raise RuleViolation(f"{path.name} has auto_map, code of its own; hand in a model without")
    if kind == "lora":
        hidden_size = next((base[key] for key in ("hidden_size", "n_embd") if key in base), 1 << 16)
        settings = adapter_settings(_json(out / ADAPTER), base_model_id, hidden_size)
        check_adapter(_joined(held), settings, folder_tensors(base_model))
        write_json(out / ADAPTER, settings)
        _remove(out, [CONFIG, GENERATION])  # the base model's serve
    else:
        _keep_model(out, held, base_model, base)
        if WEIGHTS not in names:
            _write_index(out / INDEX, held)
    if (out / TOKENIZER[0]).exists() or list(out.glob("*.model")):
        check_tokenizer(out, base.get("vocab_size", 0))
    return kind, pickles, size


def _keep_model(out: Path, held: dict[Path, Tensors], base_model: Path, base: dict[str, Any]) -> None:
    """Check a whole model's weights, and write its configs anew."""
    config = model_config(_json(out / CONFIG), base_model, _joined(held))
    check_weights(_joined(held), folder_tensors(base_model))
    write_json(out / CONFIG, config)
    if (out / GENERATION).exists():
        write_json(out / GENERATION, generation_config(_json(out / GENERATION), base.get("vocab_size", 0)))


def take_weights(left: Path, out: Path, *, base_model: Path, limit: int) -> None:
    """Copy the weights of a whole model; its config is the base model's, with their dtype.

    Raises RuleViolation as `take_model` does.
    """
    result = Incoming(left.parent, left.name)
    names = [name for name in _names(result) if name.endswith(".safetensors")]
    if not names:
        raise RuleViolation(f"{left.name} has no .safetensors weights")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    copy_files([result / name for name in names], out, limit)
    held = {path: tensors(path) for path in sorted(out.glob("*.safetensors"))}
    check_weights(_joined(held), folder_tensors(base_model))
    write_json(out / CONFIG, with_dtype(_json(base_model / CONFIG), _joined(held)))
    if names != [WEIGHTS]:
        _write_index(out / INDEX, held)


def _taken(result: Incoming, names: list[str], *, sharded: bool) -> list[Incoming]:
    """Return the files to copy. Of a sharded model with an index, its weights are those named there."""
    files = [result / name for name in names if _is_taken(name)]
    for file in files:
        if not file.name.endswith(".safetensors") and (size := file.size()) > INDEX_BYTES:
            raise RuleViolation(f"{file} has {size >> 20} MB; at most {INDEX_BYTES >> 20} are taken")
    if not sharded or INDEX not in names:
        return files
    index = result / INDEX
    shards = [result / name for name in shard_names(index, index.read())]
    if absent := [shard for shard in shards if shard not in files]:
        raise RuleViolation(f"{absent[0]} is in {INDEX} and not in the result; save the whole model")
    return [file for file in files if file in shards or not file.name.endswith(".safetensors")]


def _some(names: list[str]) -> str:
    return (", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")) if names else "nothing"


def _joined(held: dict[Path, Tensors]) -> Tensors:
    """Return the tensors of all weight files. Raises RuleViolation for a name that two files hold."""
    joined: Tensors = {}
    holders: dict[str, Path] = {}
    for path, found in held.items():
        for name in found:
            if (other := holders.setdefault(name, path)) is not path:
                files = f"{other.name} and {path.name}"
                raise RuleViolation(f"{files} both hold the tensor {name!r}; leave one model in the result")
        joined |= found
    return joined


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _write_index(path: Path, held: dict[Path, Tensors]) -> None:
    """Write which of the weight files holds which tensor."""
    weight_map = {name: shard.name for shard, found in held.items() for name in found}
    size = sum(shard.stat().st_size for shard in held)
    write_json(path, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise RuleViolation(f"the result's {path.name} is not JSON") from None

"""Files that come from a team. Nothing of them is trusted: a link is not followed, a pickle is not opened,
code is not taken, and a weight file must be what its name says.

    check_files    a team's folder before it is shown to its program or copied
    take_model     what a training program left, into a folder of ours
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any, Literal

from palio.errors import BadInput, RuleViolation
from palio.incoming import INDEX_BYTES, Incoming, copy_files, shard_names
from palio.provenance import write_json

TAKEN = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})
"""Suffixes of files that are taken over; tokenizers are `.json`, `.txt` and `.model`."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"})
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100 << 20
"""safetensors' own limit."""


def check_files(folder: Path, key: str) -> None:
    """A team's folder holds plain files and folders, and its program will be able to read them.

    Raises BadInput with `key`, the place in the entry file.
    """
    if not folder.is_dir():
        raise BadInput("entry", key, str(folder), why="no such folder", fix="correct the path")
    for where, folders, files in os.walk(folder):
        for path in (Path(where), *(Path(where, name) for name in (*folders, *files))):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise BadInput(path, why="is a symbolic link", fix="put the file itself there")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise BadInput(path, why="is neither a file nor a folder", fix="remove it")
            readable = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
            if os.geteuid() == 0 and mode & readable != readable:  # the program is not root
                raise BadInput(path, why="is for its owner only", fix=f"run chmod -R o+rX {folder}")


def take_model(
    left: Path, out: Path, *, base_model: Path, base_model_id: str, limit: int
) -> tuple[Literal["lora", "full"], list[str]]:
    """Copy an adapter or a model out of the folder a program left; which of the two it is, and the names of
    pickles that were left there.

    Other files are left where they are too: checkpoints, logs. The index of a sharded model is written anew.

    Raises RuleViolation if there is neither, if it has more than `limit` bytes, or holds what Palio does not
    load.
    """
    result = Incoming(left.parent, left.name)
    try:
        names = result.names()
    except (FileNotFoundError, NotADirectoryError):
        names = []
    if "adapter_config.json" in names:
        kind: Literal["lora", "full"] = "lora"
    elif "config.json" in names:
        kind = "full"
    else:
        raise RuleViolation(
            f"the program left neither adapter_config.json nor config.json in its result: {_some(names)}"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    copy_files(_taken(result, names, sharded=kind == "full" and WEIGHTS not in names), out, limit)
    weights = sorted(out.glob("*.safetensors"))
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if not weights:
        found = f"{_some(pickles)}: a pickle runs code when it is opened" if pickles else _some(names)
        raise RuleViolation(f"the result has no .safetensors weights but {found}; save safetensors")
    tensors = {path: _tensors(path) for path in weights}
    for path in sorted(out.glob("*.json")):
        content = _json(path)
        if isinstance(content, dict) and content.get("auto_map"):
            raise RuleViolation(f"{path.name} has auto_map, code of its own; hand in a model without")
    if kind == "lora":
        _settle_adapter(out / "adapter_config.json", base_model_id)
    else:
        _check_architecture(_json(out / "config.json"), _json(base_model / "config.json"))
        if WEIGHTS not in names:
            _write_index(out / INDEX, tensors)
    return kind, pickles


def _taken(result: Incoming, names: list[str], *, sharded: bool) -> list[Incoming]:
    """Return the files to copy. Of a sharded model with an index, its weights are those named there."""
    files = [
        result / name for name in names if Path(name).suffix in TAKEN and not name.endswith(".index.json")
    ]
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


def _tensors(path: Path) -> list[str]:
    """Read the names of a weight file's tensors.

    Its header must be JSON and its tensors fill the file exactly: no pickle, not torn.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(HEADER_BYTES, size - 8):
            raise RuleViolation(f"{path.name} is not safetensors; save with save_pretrained")
        header = stream.read(length)
    try:
        tensors = {name: of for name, of in json.loads(header).items() if name != "__metadata__"}
        end = max((int(of["data_offsets"][1]) for of in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise RuleViolation(f"{path.name} is not safetensors; save with save_pretrained") from None
    if not tensors or 8 + length + end != size:
        raise RuleViolation(f"{path.name} is torn; save to another folder, then rename it to the result's")
    return list(tensors)


def _write_index(path: Path, tensors: dict[Path, list[str]]) -> None:
    """Write which of the weight files holds which tensor."""
    weight_map: dict[str, str] = {}
    for shard, names in tensors.items():
        for name in names:
            if name in weight_map:
                files = f"{weight_map[name]} and {shard.name}"
                raise RuleViolation(f"{files} both hold the tensor {name!r}; leave one model in the result")
            weight_map[name] = shard.name
    size = sum(shard.stat().st_size for shard in tensors)
    write_json(path, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise RuleViolation(f"the result's {path.name} is not JSON") from None


def _settle_adapter(config: Path, base_model_id: str) -> None:
    """The adapter is LoRA's and names no path and no module to import."""
    settings = _json(config)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise RuleViolation("adapter_config.json: peft_type is not LORA; hand in the merged model instead")
    settings |= {"base_model_name_or_path": base_model_id, "auto_mapping": None}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_architecture(ours: Any, base: Any) -> None:
    for key in ("model_type", "architectures"):
        if not isinstance(ours, dict) or ours.get(key) != base.get(key):
            raise RuleViolation(
                f"config.json: {key} is not {base.get(key)!r}, the base model's; tune the entry's base model"
            )

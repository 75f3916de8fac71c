"""A base model's own Python code: the files that an organizer approved, and their import.

transformers imports such code with `trust_remote_code=True`, from a cache that it copies files into. Palio
reads each file once, compares these bytes with the approved sha256 and executes exactly them, in the room of
`palio.sandbox` alone. The classes are then registered, so transformers knows the family as one of its own,
and everything that loads the model says `trust_remote_code=False` as ever.

    approval_lines    what to paste into a rule set
    take_code         approved files into the folder of a fetched base model
    import_code       inside the room: the files' classes, known to transformers from then on
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType

from palio.errors import BadInput, PalioError, RuleViolation
from palio.files import json_object

AUTO_CLASSES = ("AutoConfig", "AutoModelForCausalLM")
"""Entries of `auto_map` in config.json that Palio follows."""
FILE_BYTES = 4 << 20
"""Of a Python file; the largest model of transformers has 0.2 MB."""
HOST_NAME = "entry"
"""Of the room."""
PACKAGE = "palio_model_code"
"""Name of the package that the files are modules of."""


def python_files(folder: Path) -> dict[str, bytes]:
    """Return the content of the Python files of a model's folder by name.

    Raises RuleViolation for one that is larger than `FILE_BYTES` or no file.
    """
    found = {}
    for path in sorted(folder.glob("*.py")):
        if not path.is_file():
            raise RuleViolation(f"{path} is not a file")
        with path.open("rb") as stream:
            found[path.name] = stream.read(FILE_BYTES + 1)
        if len(found[path.name]) > FILE_BYTES:
            raise RuleViolation(
                f"{path} has more than {FILE_BYTES >> 20} MB, the most that a source file may have"
            )
    return found


def digests(sources: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in sources.items()}


def code_differences(approved: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what of a model's code is not what was approved: file, sha256 expected and found."""
    return [
        f"{name}: expected sha256 {approved.get(name, 'none, it is not approved')}, "
        f"found {found.get(name, 'no such file')}"
        for name in sorted({*approved, *found})
        if approved.get(name) != found.get(name)
    ]


def require_approved(approved: Mapping[str, str], sources: Mapping[str, bytes]) -> None:
    """Raise RuleViolation unless files are exactly the approved ones."""
    if wrong := code_differences(approved, digests(sources)):
        fix = "read it, then approve it with `palio model-code`, or give the approved revision"
        raise RuleViolation(f"the model's code is not the approved one: {'; '.join(wrong)}", fix)


def approval_lines(sources: Mapping[str, bytes]) -> Iterator[str]:
    """Yield the lines of a rule set that approve these files."""
    yield "    code:"
    yield from (f"      {name}: {digest}" for name, digest in digests(sources).items())


def take_code(folder: Path, target: Path, approved: Mapping[str, str]) -> None:
    """Write the approved files of a model's folder into `target`.

    Raises RuleViolation if the folder has any other Python file, one with another hash, or lacks one.
    """
    sources = python_files(folder)
    require_approved(approved, sources)
    for name, content in sources.items():
        (target / name).write_bytes(content)  # no link: its owner could change it
        (target / name).chmod(0o644)


def named_classes(folder: Path) -> dict[str, tuple[str, str]]:
    """Return module and class of each of `AUTO_CLASSES`, as config.json names them.

    Raises BadInput if it names none, or code of another repository, or if the tokenizer has code of its own.
    """
    if "auto_map" in json_object(folder / "tokenizer_config.json"):
        why = "the tokenizer has code of its own (auto_map), which Palio does not run"
        fix = "give the model a tokenizer.json, and a tokenizer_config.json without auto_map"
        raise BadInput("base_model", "tokenizer_config.json", why=why, fix=fix)
    auto_map = json_object(folder / "config.json").get("auto_map")
    named = {}
    for name in AUTO_CLASSES:
        reference = auto_map.get(name) if isinstance(auto_map, dict) else None
        if isinstance(reference, str) and "--" in reference:
            why, fix = f"names {reference}, code of another repository", "give a model with its own code"
            raise BadInput("base_model", f"auto_map.{name}", why=why, fix=fix)
        if not isinstance(reference, str) or not re.fullmatch(r"\w+\.\w+", reference):
            why, fix = "names no class of a file beside it", "use another base model"
            raise BadInput("base_model", f"auto_map.{name}", reference, why=why, fix=fix)
        module, _, kind = reference.partition(".")
        named[name] = (module, kind)
    return named


# --- inside the room -----------------------------------------------------------------------------------


def import_code(folder: Path, approved: Mapping[str, str]) -> None:
    """Import a model's code, if its files are those approved, and make its classes known to transformers.

    Raises:
        PalioError: this process is not confined.
        RuleViolation: the files are others.
        BadInput: they cannot be imported here, or name no causal language model.
    """
    _require_room()
    sources = python_files(folder)
    require_approved(approved, sources)
    named = named_classes(folder)
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.meta_path.insert(0, _Files(sources))
    try:
        config, model = (
            getattr(importlib.import_module(f"{PACKAGE}.{module}"), kind) for module, kind in named.values()
        )
        AutoConfig.register(json_object(folder / "config.json").get("model_type"), config)
        AutoModelForCausalLM.register(config, model)
    except Exception as error:  # it is others' code: importing it may raise anything
        cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        why = f"its code cannot be used with this transformers and these packages ({cause})"
        fix = "use another base model, or train and serve it by programs of your own (command, server)"
        raise BadInput("base_model", "code", why=why, fix=fix) from error


def _require_room() -> None:
    """Raise PalioError unless this process is in a room of `palio.sandbox`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    interfaces = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]
    outside = [
        why
        for why, wrong in {
            "it may gain rights": facts["NoNewPrivs"] != "1" or int(facts["CapEff"], 16) != 0,
            "no system call is filtered": facts["Seccomp"] != "2",
            "it has a network": any(not line.strip().startswith("lo:") for line in interfaces),
            "it has the host's name": socket.gethostname() != HOST_NAME,
        }.items()
        if wrong
    ]
    if outside:
        raise PalioError(f"a model's own code is imported in the sandbox only, and here {', '.join(outside)}")


class _Files(importlib.abc.InspectLoader, importlib.abc.MetaPathFinder):
    """Imports files that have been read as modules of one package, so `from .other import x` works."""

    def __init__(self, sources: Mapping[str, bytes]) -> None:
        self._modules = {f"{PACKAGE}.{Path(name).stem}": content for name, content in sources.items()}
        self._modules[PACKAGE] = b""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._modules:
            return None
        spec = importlib.util.spec_from_loader(fullname, self, origin=self._origin(fullname))
        assert spec is not None
        spec.has_location = True  # `inspect` asks a module for its file
        return spec

    def is_package(self, fullname: str) -> bool:
        return fullname == PACKAGE

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._modules[fullname])

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._modules[fullname], self._origin(fullname))

    def _origin(self, fullname: str) -> str:
        return f"<{fullname}>"

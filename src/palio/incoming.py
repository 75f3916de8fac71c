"""Files from outside: opened without following a link, and judged by what was opened.

A team can replace any file or folder that it writes to, at any time. So its paths are never resolved ahead of
use: each component is opened from the folder above it, and a link in any of them is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath

from palio.errors import RuleViolation
from palio.provenance import CHUNK, fingerprint

MAX_DEPTH = 32
"""Components of a path below its root."""
INDEX_BYTES = 64 << 20
"""The most that a config or an index has."""
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe that nobody writes to does not block


@dataclass(frozen=True)
class Incoming:
    """A file or folder at `name` below `root`. Links in the path of `root` are the organizer's: they are
    followed. Below it only folders and regular files are opened.

    Methods raise RuleViolation at anything else, and OSError if there is nothing.
    """

    root: Path
    name: str = "."

    @classmethod
    def locate(cls, path: Path, roots: Sequence[Path]) -> Incoming:
        """Find the root that `path` lies below, by its text alone. Without roots it is the path's folder."""
        if not roots:
            return cls(path.parent, path.name)
        absolute = _absolute(path)
        for root in (real for given in roots for real in (given, given.resolve())):
            if absolute.is_relative_to(_absolute(root)):
                return cls(root, absolute.relative_to(_absolute(root)).as_posix())
        folders = " or ".join(map(str, roots))
        raise RuleViolation(f"{path} does not lie in {folders}", "put it in your team's folder there")

    def __str__(self) -> str:
        path = str(self.root / self.name)
        return path if path.isprintable() else ascii(path)

    def __truediv__(self, name: str) -> Incoming:
        return Incoming(self.root, (PurePosixPath(self.name) / name).as_posix())

    def is_folder(self) -> bool:
        with self._opened() as descriptor:
            return stat.S_ISDIR(os.fstat(descriptor).st_mode)

    def names(self) -> list[str]:
        """Return the sorted names of what is in the folder, opening none of it."""
        with self._opened() as descriptor:
            return sorted(os.listdir(descriptor))  # noqa: PTH208 (of an open folder)

    def files(self) -> Iterator[Incoming]:
        """Walk the folder: every file at any depth."""
        for name in self.names():
            child = self / name
            if child.is_folder():
                yield from child.files()
            else:
                yield child

    def open(self) -> BufferedReader:
        with self._opened() as descriptor:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RuleViolation(f"{self} is a folder", "put a file there")
            return os.fdopen(os.dup(descriptor), "rb")

    def size(self) -> int:
        with self.open() as stream:
            return os.fstat(stream.fileno()).st_size

    def modified(self) -> float:
        with self.open() as stream:
            return os.fstat(stream.fileno()).st_mtime

    def read(self) -> bytes:
        """Read a file that is only to be a config or an index."""
        with self.open() as stream:
            content = stream.read(INDEX_BYTES + 1)
        if len(content) > INDEX_BYTES:
            raise RuleViolation(f"{self} has more than {INDEX_BYTES >> 20} MB", "make it smaller")
        return content

    def sha256(self) -> str:
        """Hash a file's content, or all files of a folder by their names."""
        if self.is_folder():
            names = {
                PurePosixPath(file.name).relative_to(self.name).as_posix(): file for file in self.files()
            }
            return fingerprint({name: file.sha256() for name, file in names.items()})
        with self.open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @contextmanager
    def _opened(self) -> Iterator[int]:
        parts = PurePosixPath(self.name).parts
        if len(parts) > MAX_DEPTH or {"..", "/"} & set(parts):
            raise RuleViolation(f"{self} leaves its folder or is nested too deeply", "correct the path")
        descriptor = os.open(self.root, _FLAGS | os.O_DIRECTORY)
        try:
            for depth, part in enumerate(parts, start=1):
                child = Incoming(self.root, "/".join(parts[:depth]))._open_in(descriptor, part)
                os.close(descriptor)
                descriptor = child
            yield descriptor
        finally:
            os.close(descriptor)

    def _open_in(self, folder: int, name: str) -> int:
        """Open this file or folder, `name` in the open `folder`."""
        try:
            descriptor = os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=folder)
        except ValueError:  # a null byte, or characters that no file name can have
            raise RuleViolation(f"{self} is not a file name", "correct the path") from None
        except PermissionError:
            raise RuleViolation(f"{self} cannot be read", "run chmod -R o+rX on its folder") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                fix = "put the file or folder itself there"
                raise RuleViolation(f"{self} is a symbolic link", fix) from None
            if error.errno != errno.ENXIO:  # of a socket
                raise
        else:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                return descriptor
            os.close(descriptor)
        raise RuleViolation(f"{self} is neither a file nor a folder", "remove it")


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.absolute keeps `..`)


def copy_files(files: Sequence[Incoming], target: Path, limit: int, *, name: str | None = None) -> int:
    """Copy files into the folder `target`, or none of them if they have more than `limit` bytes in all.

    Everybody may read the copies, and execute those that their owner could. Returns the bytes copied.
    """
    if (total := sum(file.size() for file in files)) > limit:
        raise RuleViolation(f"the files to take have {total >> 20} MB, more than the {limit >> 20} allowed")
    copied = 0
    for file in files:
        copy = target / (name or PurePosixPath(file.name).name)
        with file.open() as reader, copy.open("wb") as writer:
            while chunk := reader.read(CHUNK):
                copied += len(chunk)
                if copied > limit:
                    raise RuleViolation(f"{file} grew while it was copied", "stop writing before the end")
                writer.write(chunk)
            executable = os.fstat(reader.fileno()).st_mode & stat.S_IXUSR
            os.fchmod(writer.fileno(), 0o755 if executable else 0o644)
    return copied


def names_beside(index: object, names: Iterable[object]) -> list[str]:
    """Return the file names that an index holds: each must be a plain name, of a file beside it."""
    checked = []
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
            raise RuleViolation(f"{index} names {name!r:.200}", "it may name only files beside it")
        checked.append(name)
    return checked


def shard_names(index: object, content: bytes) -> list[str]:
    """Return the weight files that a Hugging Face index (`*.index.json`) names, sorted."""
    try:
        names = json.loads(content)["weight_map"].values()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RuleViolation(
            f"{index} has no weight_map", "save the model again with save_pretrained"
        ) from None
    return sorted(set(names_beside(index, names)))


def saved_tables(folder: Incoming) -> list[Incoming]:
    """Return the Arrow files of a folder that `datasets` saved, in order. Raises ValueError if it is none."""
    state = folder / "state.json"
    try:
        names = [table["filename"] for table in json.loads(state.read())["_data_files"]]
    except (TypeError, KeyError, RecursionError):
        raise ValueError(f"{state} does not list its data files") from None
    return [folder / name for name in names_beside(state, names)]

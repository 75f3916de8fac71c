"""An image's layers as a folder: what a container sees as `/`, and nothing outside it.

Every path is resolved as inside the image, where a link to `/x` leads to its own `/x`. Devices, pipes,
owners, setuid bits and capabilities are dropped: the room has devices of its own, and no program in it
becomes anybody else. Everybody may read and write what is there: the folder lies behind one of mode 0700, and
the room shows it under scratch that takes the changes (`palio.sandbox.room`).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tarfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import IO

import zstandard

from palio.errors import RuleViolation
from palio.provenance import CHUNK, write_text
from palio.sandbox.archive import ImageArchive

FILES = 2_000_000
"""The most that an image has; one with PyTorch and CUDA has some 60 000."""
DEPTH = 200
"""Folders below each other."""
HOPS = 40
"""Links on the way to one file, as the kernel allows."""
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
"""Prefix of what a layer removes, and what hides all that lower layers have in a folder."""
DAMAGED = (
    tarfile.TarError,
    EOFError,
    ValueError,
    OverflowError,
    zlib.error,
    zstandard.ZstdError,
    RecursionError,
    KeyError,
)
HOSTS = "127.0.0.1 localhost\n::1 localhost\n"
RESOLVER = Path("/etc/resolv.conf")
_MACHINES_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)


def inside(root: Path, name: str, *, last: bool = True) -> Path:
    """Return where `name` leads for a program whose root folder is `root`; never outside of it.

    Args:
        last: follow a link that the last component is.

    Raises RuleViolation for links that go round in circles.
    """
    todo, where, hops = [*reversed(PurePosixPath(name).parts)], root, 0
    while todo:
        part = todo.pop()
        if part in ("/", "//"):
            where = root
        elif part == "..":
            where = where.parent if where != root else root
        elif (step := where / part).is_symlink() and (todo or last):
            if (hops := hops + 1) > HOPS:
                raise RuleViolation(f"the image's {name!r:.200} is a link in circles", "correct it")
            todo += reversed(step.readlink().parts)
        else:
            where = step
    return where


def unpack(archive: ImageArchive, root: Path, limit: int) -> Counter[str]:
    """Unpack all layers into the new folder `root`, and return what was left out, by kind.

    Raises RuleViolation: a layer is damaged, or there are more than `limit` bytes or `FILES` files.
    """
    root.mkdir(parents=True)
    unpacking = _Unpacking(root, limit)
    for layer in archive.layers:
        try:
            with archive.opened(layer) as stream:
                unpacking.add(stream)
        except DAMAGED as error:
            what = f"{type(error).__name__}: {error}"
            raise RuleViolation(
                f"the image's {layer.blob:.80} is damaged ({what})", "save it again"
            ) from None
        except OSError as error:
            if error.errno in _MACHINES_FAULT:
                raise
            raise RuleViolation(
                f"the image's {layer.blob:.80} is refused: {error.strerror or error}"
            ) from None
    open_to_all(root)
    return unpacking.left_out


def open_to_all(root: Path) -> None:
    """Let everybody read, write and, what can be executed, execute; no file changes who runs it."""
    root.chmod(0o777)
    for where, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(where, name)
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and mode & 0o111):
                path.chmod(0o777)
            elif stat.S_ISREG(mode):
                path.chmod(0o666)


def add_what_runtimes_add(root: Path, directory: str) -> None:
    """Make /tmp, the working directory, and the files of /etc that a container's runtime provides."""
    for what, name in (("/tmp", "/tmp"), ("WORKDIR", directory), ("/etc", "/etc")):  # noqa: S108 (the image's)
        try:
            made = inside(root, name)
            made.mkdir(parents=True, exist_ok=True)
            made.chmod(0o777)
        except (FileExistsError, NotADirectoryError):
            raise RuleViolation(f"the image's {what} {name!r:.200} is no folder", "correct it") from None
    etc = inside(root, "/etc")
    for name, text in (("hosts", HOSTS), (RESOLVER.name, RESOLVER.read_text() if RESOLVER.exists() else "")):
        if (etc / name).is_dir() and not (etc / name).is_symlink():
            raise RuleViolation(f"the image's /etc/{name} is a folder", "remove it")
        write_text(etc / name, text)  # in place of a link


class _Unpacking:
    """A folder that is filled layer by layer."""

    def __init__(self, root: Path, limit: int) -> None:
        self._root, self._limit = root, limit
        self._bytes = self._files = 0
        self.left_out: Counter[str] = Counter()

    def add(self, layer: IO[bytes]) -> None:
        of_this_layer: set[Path] = set()
        with tarfile.open(fileobj=layer, mode="r|") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                self._count(member)
                path = PurePosixPath(member.name)
                if path.name.startswith(WHITEOUT):
                    self._white_out(path, of_this_layer)
                elif path.name and path.name != "..":
                    of_this_layer.add(self._add(tar, member))

    def _count(self, member: tarfile.TarInfo) -> None:
        self._files += 1
        self._bytes += member.size if member.isreg() else 0
        if self._bytes > self._limit:
            raise RuleViolation(f"the image has more than {self._limit >> 30} GiB", "make it smaller")
        if self._files > FILES:
            raise RuleViolation(f"the image has more than {FILES} files", "make it smaller")

    def _place(self, name: str) -> Path:
        """Where a member goes; its folder is made if a layer does not bring it."""
        path = PurePosixPath(name)
        folder = inside(self._root, str(path.parent))
        if len(folder.parts) - len(self._root.parts) > DEPTH:
            raise RuleViolation(f"the image's folders are nested deeper than {DEPTH}", "make them flatter")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / path.name

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Path:
        place = self._place(member.name)
        if member.isdir():
            if place.is_symlink() or not place.is_dir():
                _remove(place)
                place.mkdir()
        elif member.isreg():
            _remove(place)
            self._write(tar, member, place)
        elif member.issym():
            _remove(place)
            place.symlink_to(member.linkname)
        elif member.islnk():
            self._link(member, place)
        else:
            self.left_out["pipes" if member.isfifo() else "devices"] += 1
        return place

    def _write(self, tar: tarfile.TarFile, member: tarfile.TarInfo, place: Path) -> None:
        content = tar.extractfile(member)
        assert content is not None
        with place.open("xb") as file:  # a new file: no link is followed
            shutil.copyfileobj(content, file, CHUNK)
        if member.mode & (stat.S_ISUID | stat.S_ISGID):
            self.left_out["setuid bits"] += 1
        place.chmod(0o700 if member.mode & 0o111 else 0o600)
        os.utime(place, (member.mtime, member.mtime))  # Python's compiled files name their source's

    def _link(self, member: tarfile.TarInfo, place: Path) -> None:
        """A hard link; where nobody but the image's own file can be meant."""
        target = inside(self._root, member.linkname, last=False)
        if target == place:
            return
        _remove(place)
        if target.is_symlink():
            place.symlink_to(target.readlink())
        elif target.is_file():
            place.hardlink_to(target)
        else:
            raise RuleViolation(f"the image's {member.name!r:.200} links to no file", "build it again")

    def _white_out(self, path: PurePosixPath, of_this_layer: set[Path]) -> None:
        place = self._place(str(path))
        if path.name != OPAQUE:
            if (name := path.name.removeprefix(WHITEOUT)) not in ("", ".", ".."):
                _remove(place.with_name(name))
            return
        for child in place.parent.iterdir():
            if child not in of_this_layer:
                _remove(child)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

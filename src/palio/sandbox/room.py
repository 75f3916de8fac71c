"""What a team's program sees and may use, as the argument list that starts it. Pure, but for looking which
system folders exist.

    /entry                       the team's files                         read-only
    /base_model, /dataset,       inputs of the contract                   read-only
    /adapter, /model
    /job.json                    of a model's own code: what to do        read-only
    /output                      the work folder of a training program    writable, watched
    /tmp, /dev/shm               scratch, gone at the end                 writable, of fixed size
    /usr, /lib*, /bin, /etc/…    the system                               read-only
    Palio's Python environment   at its own path                          read-only
    in place of both: an image's files                                    writable, changes are scratch

There is nothing else: no home, no other entry, no stage. bubblewrap builds it in namespaces of its own
(user, process, mount, network, IPC, host name), as an ordinary user. Before that, a stage is built where

- Palio itself runs as root: it becomes a user id that no other process has, and folders that this id could
  not reach are brought where it can;
- there is an image: an overlay shows its files, and takes what the program changes of them.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from palio.config import Isolation, Program, Track
from palio.errors import RuleViolation
from palio.sandbox import gpu
from palio.sandbox.gpu_libraries import PLACE, driver_libraries, search_path
from palio.sandbox.image import Image

GIB = 1 << 30
UID = 1000
"""Of the program, as it sees itself."""
FILES, OUTPUT = "/entry", "/output"

_SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = (
    "alternatives",
    "hosts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "nsswitch.conf",
    "ssl/certs",
    "ssl/openssl.cnf",
)
_CPU_FACTS = "/sys/devices/system/cpu"
"""Numeric libraries ask it for cores and caches."""
_OURS = frozenset({"proc", "dev", "sys", Path(PLACE).parts[1]})
"""Top folders that the room makes itself, whatever an image has there."""
_IMAGE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH of an image that declares none, as container runtimes set it."""
_APPTAINER = ".singularity.d/env"
"""Where apptainer writes down the variables that an image declares."""
_OVERLAY = "/overlay"
"""In the stage: scratch, and below it the image as the room shows it."""


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes."""

    memory: int
    processes: int
    scratch: int
    output: int
    cpus: int
    gpu_memory: int | None = None
    files: int = 100_000
    """Files and folders in the output."""

    @classmethod
    def of(cls, track: Track, isolation: Isolation, cpus: int | None = None) -> Limits:
        return cls(
            memory=track.ram_gb * GIB,
            processes=isolation.processes,
            scratch=int(isolation.scratch_gb * GIB),
            output=int(isolation.output_gb * GIB),
            cpus=cpus or track.cpus,
            gpu_memory=int(track.gpu_memory_gb * 1e9) if track.gpu_memory_gb else None,
        )


@dataclass(frozen=True)
class Room:
    limits: Limits
    files: Path | None = None
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Folder of the host by its place inside, e.g. /dataset."""
    output: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    network: bool = False
    visible: tuple[str, ...] = ()
    image: Image | None = None
    """In place of the host's system."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Small read-only files by their place; in a confined room only."""
    low_ports: bool = False
    """Whether it may listen on ports below 1024, in its own network."""


@dataclass(frozen=True)
class Mount:
    source: Path
    place: str
    writable: bool = False


def mounts(room: Room) -> tuple[list[Mount], list[tuple[str, str]]]:
    """What of the host is seen where, and symbolic links of the room (target, place)."""
    found: list[Mount] = []
    links: list[tuple[str, str]] = []
    if room.image is None:
        found, links = _top_folders([Path("/", name) for name in _SYSTEM if Path("/", name).exists()])
        etc = [*_ETC, "resolv.conf"] if room.network else _ETC
        found += [Mount(path.resolve(), str(path)) for name in etc if (path := Path("/etc", name)).exists()]
        found += [Mount(path, str(path)) for path in _python_environment()]
    if Path(_CPU_FACTS).exists():
        found.append(Mount(Path(_CPU_FACTS), _CPU_FACTS))
    if room.limits.gpu_memory is not None:
        found.append(Mount(Path("/sys"), "/sys"))  # CUDA looks up the PCI bus there
        libraries = driver_libraries() if room.image else {}
        found += [Mount(path, place) for place, path in libraries.items()]
    for shown in room.visible:
        _require_no_link(room.image, shown)
        found.append(Mount(Path(shown).resolve(), shown))
    found += [Mount(path.resolve(), place) for place, path in room.inputs.items()]
    if room.files is not None:
        found.append(Mount(room.files.resolve(), FILES))
    if room.output is not None:
        found.append(Mount(room.output.resolve(), OUTPUT, writable=True))
    return found, links


def _top_folders(paths: list[Path]) -> tuple[list[Mount], list[tuple[str, str]]]:
    """Each at its name below `/`; a symbolic link, such as /lib to usr/lib, stays one."""
    found = [Mount(path, f"/{path.name}") for path in sorted(paths) if not path.is_symlink()]
    return found, [(str(path.readlink()), f"/{path.name}") for path in sorted(paths) if path.is_symlink()]


def _image_folders(image: Image, taken: list[Mount]) -> tuple[list[Mount], list[tuple[str, str]]]:
    """Return an image's top folders as the stage's overlay shows them, but for those that the room has, and
    its top links."""
    ours = _OURS | {Path(mount.place).parts[1] for mount in taken if not _lies_in(image, mount.place)}
    found, links = _top_folders([path for path in image.root.iterdir() if path.name not in ours])
    return [Mount(Path(_merged(mount.place)), mount.place, writable=True) for mount in found], links


def _merged(place: str) -> str:
    return f"{_OVERLAY}/image{place}"


def _lies_in(image: Image, place: str) -> bool:
    """Whether a mount's place is below a top folder of the image, and not one itself."""
    parts = Path(place).parts
    return len(parts) > 2 and parts[1] not in _OURS and (image.root / parts[1]).is_dir()


def _require_no_link(image: Image | None, place: str) -> None:
    """Refuse an image where a folder of the host would be mounted through a link: bubblewrap would follow it
    to where the image's maker wants it."""
    for path in [*reversed(Path(place).parents), Path(place)] if image else ():
        if image and (image.root / path.relative_to("/")).is_symlink():
            raise RuleViolation(f"{path} is a link in the image, and the organizers show {place} there")


def _python_environment() -> list[Path]:
    """The interpreter and the libraries that Palio itself uses, but for what lies in /usr already."""
    prefixes = dict.fromkeys(Path(prefix) for prefix in (sys.base_prefix, sys.prefix))
    return [prefix for prefix in prefixes if not prefix.is_relative_to("/usr")]


def environment(room: Room, *, confined: bool = True) -> dict[str, str]:
    """All variables of the program; nothing of Palio's own environment is among them."""
    threads = str(room.limits.cpus)
    image = room.image
    variables = {
        "HOME": image.home if image else "/tmp",  # noqa: S108 (its own)
        "LANG": "C.UTF-8",
        "PATH": _IMAGE_PATH if image else f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        **(image.config.variables if image else {}),
        **room.variables,
    }
    if not room.network:
        variables["HF_HUB_OFFLINE"] = "1"
    if room.limits.gpu_memory is not None:
        variables["CUDA_VISIBLE_DEVICES"] = gpu.visible_inside()
        if image:
            variables["LD_LIBRARY_PATH"] = search_path(variables.get("LD_LIBRARY_PATH"))
    if not confined:
        real = {place: str(path.resolve()) for place, path in room.inputs.items()}
        real[OUTPUT] = str(room.output.resolve()) if room.output else ""
        real[FILES] = str(room.files.resolve()) if room.files else ""
        for name, value in variables.items():
            place = "/" + value.removeprefix("/").partition("/")[0]
            if value.startswith("/") and place in real:
                variables[name] = real[place] + value.removeprefix(place)
    return variables


def program_arguments(program: Program, image: Image | None = None) -> list[str]:
    """The program and its arguments; without a line to run, those of the image's ENTRYPOINT and CMD."""
    line = ["sh", "-c", program.run] if isinstance(program.run, str) else list(program.run or ())
    if image is None:
        return line
    line = line or list(image.config.arguments)
    if not (image.root / _APPTAINER).is_dir():
        return line
    declared = f'for file in /{_APPTAINER}/*docker*.sh; do [ -r "$file" ] && . "$file"; done; exec "$@"'
    return ["sh", "-c", declared, "sh", *line]


def limited(room: Room, arguments: list[str]) -> list[str]:
    """`arguments` under the kernel's limits for each process."""
    limits = room.limits
    allowed = sorted(os.sched_getaffinity(0))
    cpus = sorted(random.sample(allowed, min(limits.cpus, len(allowed))))
    return [
        "prlimit",
        f"--nproc={limits.processes}",
        f"--fsize={max(limits.output, limits.scratch)}",
        f"--data={limits.memory}",
        "--core=0",
        "--",
        *("taskset", "--cpu-list", ",".join(map(str, cpus))),
        *arguments,
    ]


def building(
    room: Room, *, files: Mapping[str, int], seccomp: int, info: int, block: int, uid: int | None
) -> list[str]:
    """bubblewrap's arguments that build the room.

    `files` are open descriptors of small files by their place, `seccomp` one of a filter, `info` one that
    bubblewrap writes the first process' id to, `block` one whose end it waits for before the program starts.
    `uid`, given if Palio is root, is what it becomes.
    """
    found, links = mounts(room)
    sources = [source_of(mount, number, staged=_is_staged(room, uid)) for number, mount in enumerate(found)]
    image = room.image
    if image is not None:
        of_image, links = _image_folders(image, found)
        found, sources = [*of_image, *found], [*(str(mount.source) for mount in of_image), *sources]
    arguments = [
        *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
        *("--uid", str(image.uid if image else UID), "--gid", str(image.gid if image else UID)),
        *("--cap-drop", "ALL", "--hostname", "entry", "--info-fd", str(info), "--block-fd", str(block)),
        *("--seccomp", str(seccomp)),
        *(["--share-net"] if room.network else []),
    ]
    for target, place in links:
        arguments += ["--symlink", target, place]
    scratch = str(room.limits.scratch)
    if image is None:  # before the mounts: Palio's environment may lie below the host's /tmp
        arguments += ["--perms", "1777", "--size", scratch, "--tmpfs", "/tmp"]  # noqa: S108 (its own)
    for mount, source in zip(found, sources, strict=True):
        for parent in reversed(Path(mount.place).parents[:-1]):
            arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--bind" if mount.writable else "--ro-bind", source, mount.place]
    for place, descriptor in files.items():
        arguments += ["--ro-bind-data", str(descriptor), place]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    if room.limits.gpu_memory is not None:
        for device in gpu.device_files():
            arguments += ["--dev-bind", device, device]
    arguments += ["--perms", "1777", "--size", scratch, "--tmpfs", "/dev/shm"]  # noqa: S108 (its own)
    arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--clearenv"]
    for name, value in environment(room).items():
        arguments += ["--setenv", name, value]
    return [*arguments, "--chdir", FILES if room.files else (image.config.directory if image else "/")]


def command_line(room: Room, program: Program, *, described: int, uid: int | None) -> list[str]:
    """What to start. `described` is a descriptor of the arguments of `building`: on the command line, the
    program could read the host's paths in them."""
    inside = program_arguments(program, room.image)
    line = limited(room, ["bwrap", "--args", str(described), "--", *inside])
    if not _is_staged(room, uid):
        return line
    found, _ = mounts(room)
    overlay = Overlay(room.image.root.resolve(), room.limits.scratch) if room.image else None
    return [*stage(found, uid=uid, overlay=overlay), *line]


def _is_staged(room: Room, uid: int | None) -> bool:
    return uid is not None or room.image is not None


def source_of(mount: Mount, number: int, *, staged: bool) -> str:
    """Where bubblewrap finds a mount's source."""
    return f"/s/{number}" if staged else str(mount.source)


def stage(found: list[Mount], *, uid: int | None, overlay: Overlay | None = None) -> list[str]:
    """Return what comes before a program that builds a room: it finds the mounts' sources, which it may not
    be able to reach, in /s, and an overlay over an image; and it is `uid`, if Palio is root."""
    arguments = ["bwrap", "--die-with-parent"]
    arguments += ["--unshare-user", "--uid", "0", "--gid", "0"] if uid is None and overlay else []
    # for the overlay, its own work folder, and to hand on the id 0 to the namespace of the room
    needed = ["SYS_ADMIN", "DAC_OVERRIDE", "SETFCAP"] if overlay else []
    needed += ["SETUID", "SETGID", "SETPCAP"] if uid is not None else []
    for capability in needed:
        arguments += ["--cap-add", f"CAP_{capability}"]
    system, links = _top_folders([Path("/", name) for name in _SYSTEM if Path("/", name).exists()])
    for target, place in links:
        arguments += ["--symlink", target, place]
    for mount in system:
        arguments += ["--ro-bind", str(mount.source), mount.place]
    arguments += ["--bind", "/proc", "/proc", "--dev-bind", "/dev", "/dev", "--perms", "0755", "--dir", "/s"]
    arguments += ["--perms", "0755", "--tmpfs", "/tmp"]  # noqa: S108 (bubblewrap builds the room on it)
    for number, mount in enumerate(found):
        reached = source_of(mount, number, staged=True)
        arguments += ["--bind" if mount.writable else "--ro-bind", str(mount.source), reached]
    become: list[str] = []
    if uid is not None:
        become = ["setpriv", "--reuid", f"{uid}", "--regid", f"{uid}", "--clear-groups", "--inh-caps=-all"]
        become += ["--bounding-set=-all", "--"]
    if overlay is None:
        return [*arguments, "--", *become]
    arguments += [
        "--ro-bind",
        str(overlay.lower),
        "/s/image",
        "--size",
        str(overlay.size),
        "--tmpfs",
        _OVERLAY,
    ]
    for name in ("upper", "work", "image"):
        arguments += ["--dir", f"{_OVERLAY}/{name}"]
    return [*arguments, "--", "sh", "-c", f'{_mount_overlay(uid)} && exec "$@"', "sh", *become]


@dataclass(frozen=True)
class Overlay:
    """An image's folder, and the bytes that changes of it may take."""

    lower: Path
    size: int


def _mount_overlay(uid: int | None) -> str:
    parts = {"lowerdir": "/s/image", "upperdir": f"{_OVERLAY}/upper", "workdir": f"{_OVERLAY}/work"}
    options = ",".join(f"{name}={path}" for name, path in parts.items())
    options += ",userxattr" if uid is None else ""  # others are for the machine's root alone
    return f"mount -t overlay overlay -o {options} {_OVERLAY}/image"

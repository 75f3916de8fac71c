"""Install the last commit on a bare Debian that has no compiler; print how long it took and how large it is.

    python3 tests/setup/bare_debian.py [--suite trixie] [demo]

Debian bookworm has Python 3.11, trixie 3.13. The system holds what the README asks for and nothing else, its
/tmp is as small as one in memory, and pip is configured as it is outside. Needs root, mmdebstrap, bubblewrap.
"""

from __future__ import annotations

import argparse
import ast
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PREFLIGHT = runpy.run_path(str(ROOT / "envs/preflight.py"))
PACKAGES = "python3,python3-venv,make,ca-certificates,git"
TMP_BYTES = 10**9


def pip_options() -> dict[str, str]:
    """Return pip's configuration on this machine as environment variables."""
    listed = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True).splitlines()
    options = {}
    for line in sorted(listed, key=lambda line: line.startswith(":env:")):  # the environment wins
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2].upper().replace("-", "_")
        options[f"PIP_{name}"] = ast.literal_eval(value)
    return options


def local_paths(options: dict[str, str]) -> Iterator[Path]:
    """Yield the files and folders that pip's configuration names."""
    for word in " ".join(options.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            yield path.parent if word.startswith("file://") else path  # an index links to files beside it


def run_inside(root: Path, *command: str) -> None:
    """Run a command in the repository inside the bare system, which shares only the network with this one."""
    options = pip_options()
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", **options}
    sandbox = ["bwrap", "--bind", str(root), "/", "--proc", "/proc", "--dev", "/dev"]
    sandbox += ["--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/palio"]
    sandbox += ["--unshare-pid", "--die-with-parent", "--clearenv"]
    for path in (Path("/etc/resolv.conf"), *local_paths(options)):
        sandbox += ["--ro-bind", str(path), str(path)]
    for name, value in environment.items():
        sandbox += ["--setenv", name, value]
    subprocess.run([*sandbox, *command], check=True)


def installed_gb(folder: Path) -> float:
    """Return the disk space that a folder takes."""
    return 1e-9 * int(subprocess.check_output(["du", "--summarize", "--block-size=1", folder]).split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="env", choices=["env", "demo"], help="of the Makefile")
    parser.add_argument("--suite", default="bookworm", help="release of Debian")
    arguments = parser.parse_args()
    missing = [program for program in ("mmdebstrap", "bwrap") if not shutil.which(program)]
    if missing or os.getuid() != 0:
        sys.exit("error: this needs root, and apt-get install mmdebstrap bubblewrap")
    with tempfile.TemporaryDirectory(prefix="palio-setup-") as folder:
        root = Path(folder)
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", arguments.suite, root],
            check=True,
        )
        subprocess.run(["git", "clone", "--quiet", ROOT, root / "palio"], check=True)
        run_inside(root, "sh", "-c", "! command -v cc gcc g++ clang")
        start = time.monotonic()
        run_inside(root, "make", arguments.target)
        minutes = (time.monotonic() - start) / 60
        run_inside(root, ".venv/bin/palio", "--version")
        size_gb = installed_gb(root / "palio/.venv")
        print(f"{arguments.suite}: make {arguments.target} in {minutes:.1f} minutes, .venv {size_gb:.1f} GB")
        stated_gb = PREFLIGHT["INSTALLED_GB"]["cuda"]
        if size_gb > stated_gb:
            sys.exit(f"error: envs/preflight.py: INSTALLED_GB is {stated_gb}, measured {size_gb:.1f}")


if __name__ == "__main__":
    main()

"""Attacks that read: the closed stage, the organizer's files, other entries, secrets of the environment."""

from __future__ import annotations

import os
import sys
from ast import literal_eval
from pathlib import Path

import pytest

from tests.attacks.conftest import Attack

CANARY = "the closed stage's 42nd question"


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A file of the closed stage that every user of the machine may read: only the room hides it."""
    path = tmp_path / "closed" / "instances.txt"
    path.parent.mkdir()
    path.write_text(CANARY)
    for folder in (path.parent, tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    return path


def test_the_closed_file_is_at_no_path_that_can_be_guessed(attack: Attack, closed: Path) -> None:
    done = attack(
        f"""
import glob, os
closed = {str(closed)!r}
roots = ["", "/proc/self/root", "/proc/1/root", "/proc/self/cwd", "/entry/..", "/output/../../..",
         "/s", "/host", "/oldroot", "/newroot", "/mnt", "/proc/1/cwd", "/tmp/../.."]
roots += glob.glob("/proc/[0-9]*/root") + glob.glob("/proc/[0-9]*/cwd") + glob.glob("/proc/[0-9]*/fd/*")
for root in roots:
    for path in (root + closed, root + "/closed/instances.txt"):
        try:
            print("READ", path, open(path).read())
        except OSError:
            pass
os.symlink(closed, "/output/link")
try:
    print("READ", open("/output/link").read())
except OSError:
    pass
for where, folders, files in os.walk("/"):
    if where.startswith(("/proc", "/sys", "/usr")):
        folders.clear()
    if "instances.txt" in files:
        print("FOUND", where)
print("tried", len(roots))
"""
    )
    assert done.said[-1].startswith("tried")
    assert CANARY not in done.log
    assert "FOUND" not in done.log


def test_of_the_machine_only_the_system_and_the_python_environment_are_seen(attack: Attack) -> None:
    done = attack(
        f"""
import os
for path in ({str(Path.home())!r}, {str(Path.cwd())!r}, "/home", "/root", "/var", "/srv", "/mnt", "/opt",
             "/boot", "/etc/shadow", "/etc/ssh", "/etc/passwd", "/run", "/sys/kernel", "/sys/fs"):
    if os.path.isdir(path):
        print(path, os.listdir(path))
    elif os.path.exists(path):
        print(path, open(path).read().strip())
print("looked")
"""
    )
    assert done.said[-1] == "looked"
    seen = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.said[:-1]}
    assert seen.pop("/etc/passwd").startswith("entry:")
    for path, names in seen.items():
        assert set(literal_eval(names)) <= leads_to_python(Path(path)), path


def leads_to_python(folder: Path) -> set[str]:
    """Names in `folder` on the path to the Python environment, wherever that is installed."""
    environments = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.base_prefix).resolve()]
    return {one.relative_to(folder).parts[0] for one in environments if folder in one.parents}


def test_the_files_of_another_entry_are_not_there(attack: Attack, tmp_path: Path) -> None:
    other = tmp_path.parent / f"{tmp_path.name}-other" / "adapter.json"
    other.parent.mkdir()
    other.write_text("their adapter")
    done = attack(
        f"""
import os
print(os.path.exists({str(other)!r}), sorted(os.listdir("/")), os.listdir("/output"), os.listdir("/entry"))
"""
    )
    assert done.said[0].startswith("False")
    assert done.said[0].endswith("[] ['main.py']")


def test_secrets_of_palios_environment_are_in_no_process_it_can_see(
    attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws_secret")
    done = attack(
        """
import glob, os
print(dict(os.environ))
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"):
    try:
        print(path, open(path, "rb").read())
    except OSError:
        pass
"""
    )
    assert "PYTHONUNBUFFERED" in done.log
    assert "/proc/1/environ" in done.log
    assert "_secret" not in done.log
    assert "HF_TOKEN" not in done.log


def test_processes_outside_are_neither_seen_nor_reached_by_a_signal(attack: Attack) -> None:
    done = attack(
        f"""
import os, signal
print("seen", sum(name.isdigit() for name in os.listdir("/proc")), flush=True)  # the first signal ends it all
for pid in (-1, {os.getpid()}, {os.getppid()}):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError as error:
        print(pid, error.strerror)
"""
    )
    assert done.code is not None
    assert int(done.said[0].split()[1]) <= 4
    assert done.lived == []

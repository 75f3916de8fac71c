"""An image's files take the place of the system; the confinement is the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from palio.config import Program
from palio.errors import PalioError
from palio.sandbox.image import image_folder
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, Limits, Room

IMAGE = f"docker://team/image@sha256:{'0' * 64}"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """As apptainer unpacks one: a shell, its libraries, and the variables that the image declares."""
    root = tmp_path / "image"
    listed = subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True, check=True).stdout
    for path in ["/bin/sh", *re.findall(r"(/\S+) \(", listed)]:
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(path).resolve(), target)
    (root / "usr" / "share").mkdir(parents=True)
    (root / "usr" / "share" / "made-by").write_text("the team\n")
    (root / ".singularity.d" / "env").mkdir(parents=True)
    (root / ".singularity.d" / "env" / "10-docker2singularity.sh").write_text("export OF_IMAGE=declared\n")
    (root / "tmp").mkdir()
    return root


def test_a_program_runs_among_the_images_files_and_sees_none_of_the_hosts(
    image: Path, tmp_path: Path
) -> None:
    line = (
        'read made < /usr/share/made-by; echo "$made, $OF_IMAGE"; echo x > /tmp/x && echo scratch; '
        "[ -e /usr/bin/env ] || echo alone; echo x 2> /dev/null > /usr/share/x || echo read-only"
    )
    limits = Limits(memory=GIB, processes=16, scratch=1 << 20, output=1 << 20, cpus=1)
    program = Program(run=line, image=IMAGE)
    with Confined(program, Room(limits, system=image), tmp_path / "log") as running:
        assert running.wait(20) == 0
    said = (tmp_path / "log").read_text().splitlines()
    assert [line for line in said if "Read-only" not in line] == [
        "the team, declared",
        "scratch",
        "alone",
        "read-only",
    ]


def test_an_image_without_apptainer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PalioError, match="images need apptainer, which is not installed here"):
        image_folder(IMAGE, tmp_path)

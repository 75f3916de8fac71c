"""An image gets the GPU driver's libraries as single files, and keeps all others of its own. They are
stand-ins here; `palio doctor` tries the real ones where there is a GPU."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import pytest

from palio.config import Program
from palio.errors import Interrupted
from palio.sandbox import gpu, gpu_libraries
from palio.sandbox.gpu_libraries import driver_libraries, libraries_in
from palio.sandbox.image import image_folder
from palio.sandbox.process import Confined
from palio.sandbox.room import GIB, Limits, Room
from tests.support.images import folder, host_files, layer, member, oci_archive, symlink

LISTED = """\
8 libs found in cache `/etc/ld.so.cache'
\tlibnvidia-ptxjitcompiler.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libnvidia-ptxjitcompiler.so.1
\tlibnvidia-ml.so.1 (libc6) => /usr/lib/i386-linux-gnu/libnvidia-ml.so.1
\tlibnvidia-ml.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1
\tlibcuda.so.1 (libc6,x86-64) => /opt/newer/libcuda.so.1
\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so.1
\tlibcuda.so (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so
\tlibcudart.so.12 (libc6,x86-64) => /usr/local/cuda/lib64/libcudart.so.12
\tlibc.so.6 (libc6,x86-64, OS ABI: Linux 3.2.0) => /lib/x86_64-linux-gnu/libc.so.6
"""


def test_the_drivers_libraries_are_found_and_no_others() -> None:
    found = libraries_in(LISTED, "x86_64")
    assert {name: str(path) for name, path in found.items()} == {
        "libnvidia-ptxjitcompiler.so.1": "/usr/lib/x86_64-linux-gnu/libnvidia-ptxjitcompiler.so.1",
        "libnvidia-ml.so.1": "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1",
        "libcuda.so.1": "/opt/newer/libcuda.so.1",
        "libcuda.so": "/usr/lib/x86_64-linux-gnu/libcuda.so",
    }
    assert libraries_in(LISTED, "aarch64") == {}


@dataclass
class NoGpu:
    """In place of NVML, which a machine without a GPU has not."""

    def memory_used(self) -> int:
        return 0


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver of two libraries, and a loader that lists them."""
    libraries = tmp_path / "driver"
    libraries.mkdir()
    for name in ("libcuda.so.550.1", "libnvidia-ml.so.550.1"):
        (libraries / name).write_text(f"{name} of the host\n")
    (libraries / "libcuda.so.1").symlink_to("libcuda.so.550.1")
    (libraries / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.550.1")
    lines = [
        f"\t{name} (libc6,x86-64) => {libraries}/{name}" for name in ("libcuda.so.1", "libnvidia-ml.so.1")
    ]
    loader = tmp_path / "ldconfig"
    loader.write_text("#!/bin/sh\ncat <<'E'\n" + "\n".join(lines) + "\nE\n")
    loader.chmod(0o755)
    monkeypatch.setattr(gpu_libraries, "SYSTEM_LDCONFIG", str(loader))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(gpu, "program_gpu", NoGpu)
    return libraries


@pytest.mark.parametrize("hostile", [False, True])
def test_a_program_in_an_image_finds_them_first_and_its_own_libc(
    hostile: bool, driver: Path, tmp_path: Path
) -> None:
    members = [*host_files("/bin/cat", "/bin/ls"), folder("tmp")]
    members += [symlink(".palio", f"/oldroot{tmp_path}")] if hostile else []
    members.append(member("usr/lib/own", b""))
    archive = oci_archive(tmp_path / "image.tar", [layer(members)], {"Env": ["LD_LIBRARY_PATH=/opt/cuda"]})
    image = image_folder(str(archive), tmp_path, GIB)
    limits = Limits(memory=GIB, processes=16, scratch=1 << 20, output=1 << 20, cpus=1, gpu_memory=GIB)
    text = "cd /.palio/gpu; ls; cat libcuda.so.1; echo $LD_LIBRARY_PATH; echo x > libcuda.so.1"
    with Confined(Program(run=text, image="x.tar"), Room(limits, image=image), tmp_path / "log") as running:
        assert running.wait(20) != 0
    said = (tmp_path / "log").read_text().splitlines()
    assert said[:4] == [
        "libcuda.so.1",
        "libnvidia-ml.so.1",
        "libcuda.so.550.1 of the host",
        "/.palio/gpu:/opt/cuda",
    ]
    assert "Read-only file system" in said[4]


def test_a_machine_without_a_driver_is_named(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_libraries, "LIBRARIES", ())
    with pytest.raises(Interrupted, match=r"no libcuda\.so\.1, which an image needs on a GPU; install the"):
        driver_libraries()

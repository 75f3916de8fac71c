"""Where a machine cannot confine, Palio says so, says what is lost, and refuses until told otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from palio.config import Isolation
from palio.errors import PalioError
from palio.sandbox import process
from palio.sandbox.doctor import examine_builds, examine_confinement, examine_images
from tests.support.programs import HANDS_IN, program_of, run_command
from tests.support.training import Entry, tiny_base_model


@pytest.fixture
def without_user_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bubblewrap as it ends on a kernel that refuses user namespaces."""
    fake = tmp_path / "bin" / "bwrap"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace, likely because' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setitem(process.SETUP, "PATH", f"{fake.parent}:{process.SETUP['PATH']}")


def test_this_machine_confines() -> None:
    assert all(finding.ok for finding in examine_confinement())


@pytest.mark.usefixtures("without_user_namespaces")
def test_a_machine_that_cannot_says_why_and_what_is_lost() -> None:
    trial = examine_confinement()[-1]
    assert not trial.ok
    assert "No permissions to create new namespace" in str(trial)
    assert "they can read the closed stage and your home" in str(trial)


@pytest.mark.usefixtures("without_user_namespaces")
def test_it_neither_builds_images_nor_runs_programs_in_them() -> None:
    if shutil.which("buildah") is None:
        pytest.skip("no buildah here; envs/debian.txt names the package")
    for trial in (examine_images(), examine_builds()):
        assert not trial.ok
        assert "No permissions to create new namespace" in str(trial)
    assert "Until then entries with a Dockerfile wait" in str(examine_builds())


@pytest.mark.usefixtures("without_user_namespaces")
def test_programs_of_teams_are_refused_there_unless_the_config_says_otherwise(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, base_model: Path
) -> None:
    entry = Entry.create(tmp_path / "entry", tiny_base_model(tmp_path_factory.mktemp("base"), base_model))
    program = program_of(tmp_path / "files", HANDS_IN + "hand_in()")
    with pytest.raises(PalioError, match=r"cannot confine a program .*`palio doctor`"):
        run_command(entry, program)
    assert run_command(entry, program, isolation=Isolation(unconfined=True)).state == "finished"

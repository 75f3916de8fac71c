"""Tokens in a team's files: named at `check`, refused in packages, never shown."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from palio.config import load_competition
from palio.credentials import KINDS, credentials
from palio.eligibility.entry_file import check_file
from palio.errors import RuleViolation
from palio.sandbox.handed_in import take_files
from palio.settings import CheckedAgainst
from tests.support.folder import ROOT, WorkingFolder

WORD = "Kd93jLqPz0xWmN4bVc7RtYsUaEgHiO2fTkQ5Zu81"
HEX = "0123456789abcdef0123456789abcdef01234567"
SPELLED = {
    "Hugging Face token": f"hf_{WORD[:34]}",
    "GitHub token": f"ghp_{WORD[:36]}",
    "OpenAI or Anthropic key": f"sk-proj-{WORD}",
    "AWS access key": "AKIA" + WORD.upper()[:16],
    "Google API key": f"AIza{WORD[:35]}",
    "Slack token": f"xoxb-{WORD}",
    "Weights & Biases key": f'wandb.login(key="{HEX}")',
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}
"""In pieces, so that this file holds none."""


def test_a_credential_of_each_kind_is_named_by_its_line() -> None:
    assert set(SPELLED) == set(KINDS)
    for kind, spelled in SPELLED.items():
        (found,) = credentials(f"import os\n\nHF = '{spelled}'\n".encode())
        assert (found.kind, found.line) == (kind, 3)
        assert spelled not in found.why


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download(repo)",
        "token = 'hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'",
        f"task-{WORD}",
        f"revision = '{HEX}'",
        "login(token=os.environ['HF_TOKEN'])",
        "import wandb  # run it with WANDB_API_KEY set",
    ],
)
def test_what_only_resembles_one_is_none(text: str) -> None:
    assert list(credentials(text.encode())) == []


def test_a_token_in_a_programs_files_is_named_at_check_and_refused_in_the_package(
    folder: WorkingFolder, tmp_path: Path
) -> None:
    folder.run("palio", "new", "config/entries/demo/drago.yaml", "--kind", "server", "--team", "Drago")
    entry = Path("config/entries/demo/drago.yaml")
    program = next(folder.path.glob("resources/teams/*/program"))
    against = CheckedAgainst.of(load_competition(Path("config/config.yaml")))
    assert check_file(entry, against).violations == []

    (program / "deep").mkdir()
    shutil.copy(ROOT / "pyproject.toml", program / "deep")
    (program / "deep" / "Dockerfile").write_text(
        f"FROM scratch\nENV HF_TOKEN={SPELLED['Hugging Face token']}\n"
    )
    (violation,) = check_file(entry, against).violations
    assert (violation.rule, violation.key) == ("credentials", "server.files")
    assert "deep/Dockerfile: line 2 holds what looks like a Hugging Face token" in violation.why
    assert "revoke it" in violation.fix
    done = folder.run("palio", "check", str(entry))
    assert done.returncode == 3
    assert WORD[:20] not in done.stdout + done.stderr
    with pytest.raises(RuleViolation, match="Dockerfile: line 2 holds what looks like a Hugging Face token"):
        take_files(str(program), "server.files", tmp_path / "package", roots=(), limit=1 << 30)
    assert not (tmp_path / "package").exists()

"""A Dockerfile is read before it is built: what will likely fail is noticed, a secret is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from palio.config import load_competition
from palio.eligibility.dockerfile import dockerfile_notices, dockerfile_violations, instructions
from palio.eligibility.entry_file import check_file, participants
from palio.settings import CheckedAgainst
from tests.support.folder import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD = f"""\
# syntax=docker/dockerfile:1
FROM nvcr.io/nvidia/pytorch:23.09-py3
ENV HF_HOME=/root/.cache/huggingface TOKENIZERS_PARALLELISM=false
ARG MAX_TOKENS=2048
RUN pip install --no-cache-dir -r requirements.txt \\
    # as 2023's sample did
    && pip install fastapi==0.95 "uvicorn~=0.21" git+https://github.com/huggingface/peft@{COMMIT}
RUN git clone https://github.com/Lightning-AI/lit-gpt && cd lit-gpt && git checkout {COMMIT}
RUN python download.py
COPY . /submission
WORKDIR /submission
CMD ["uvicorn", "main:app", "--host", "0.0.0.0", "--port", "80"]
"""


def notices(text: str, **files: str) -> list[str]:
    named = {name.replace("_", "."): content for name, content in files.items()}
    return [one.why for one in dockerfile_notices(text, named, "server.dockerfile")]


def test_a_pinned_dockerfile_has_no_notices() -> None:
    requirements = (
        "torch==2.1.0\n# comment\ntransformers>=4.30,==4.31\npeft @ https://x.org/peft.whl\n-f wheels\n"
    )
    assert (
        notices(GOOD, requirements_txt=requirements, main_py="AutoModel.from_pretrained('/base_model')") == []
    )
    assert list(dockerfile_violations(GOOD, "server.dockerfile")) == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("RUN pip install torch transformers==4.31 peft", "installs torch, peft without a version"),
        ("RUN apt-get update && python3 -m pip install -U 'torch>=2'", "installs torch>=2 without a version"),
        ("RUN pip install -i https://x.org/simple --pre torch", "installs torch without a version"),
        ("RUN pip install git+https://github.com/x/y", "installs from git without a commit"),
        ("RUN pip install git+https://github.com/x/y@main", "installs from git without a commit"),
        ("RUN git clone https://github.com/Lightning-AI/lit-gpt", "installs from git without a commit"),
        ("RUN pip install --pre torch==2.2.0.dev20230901", "installs a build of the night"),
        (
            "FROM ghcr.io/pytorch/pytorch-nightly:2.1",
            "starts from 'ghcr.io/pytorch/pytorch-nightly:2.1', an image",
        ),
        ("FROM --platform=linux/amd64 ubuntu", "starts from 'ubuntu', which is another image every week"),
        (
            'CMD ["sh", "-c", "huggingface-cli download x/y && uvicorn main:app"]',
            "downloads; if that happens at start",
        ),
    ],
)
def test_what_will_likely_fail_is_noticed_with_its_line(line: str, why: str) -> None:
    (found,) = notices(f"\n{line}\n")
    assert found.startswith(f"line 2 of the Dockerfile {why}")


def test_weights_that_are_downloaded_at_start_are_noticed() -> None:
    code = "model = AutoModelForCausalLM.from_pretrained('meta-llama/Llama-2-7b-hf', token=token)"
    (found,) = notices("FROM scratch", main_py=code)
    assert found.startswith(
        "main.py loads 'meta-llama/Llama-2-7b-hf' by its name on the hub; if that happens"
    )
    (found,) = notices("FROM scratch", serve_sh="huggingface-cli download x/y")
    assert found == "serve.sh downloads or logs in; if that happens at start, it fails"


def test_a_list_of_packages_is_read_too() -> None:
    found = notices("FROM scratch", requirements_txt="torch\nfastapi==0.9\ngit+https://github.com/x/y\n")
    assert found == [
        "requirements.txt names torch without a version",
        "requirements.txt installs from git without a commit",
    ]


@pytest.mark.parametrize(
    "line", ["ENV HUGGINGFACE_TOKEN=abcdefgh", 'ARG WANDB_API_KEY="9f8e7d"', "ENV PASSWORD hunter2"]
)
def test_a_secret_in_a_variable_is_refused_by_name(line: str) -> None:
    (found,) = dockerfile_violations(f"FROM scratch\n{line}\n", "server.dockerfile")
    assert found.rule == "credentials"
    assert found.why.startswith("line 2 of the Dockerfile sets ")
    assert line.rsplit(maxsplit=1)[-1].rsplit("=", maxsplit=1)[-1].strip('"') not in str(found)


@pytest.mark.parametrize(
    "line", ["ARG HF_TOKEN", "ENV HF_TOKEN=$TOKEN", "ENV MAX_TOKEN=512", "ENV TOKEN_PATH=/run/x"]
)
def test_a_variable_without_a_secret_is_not(line: str) -> None:
    assert list(dockerfile_violations(line, "server.dockerfile")) == []


def test_continued_lines_are_one_instruction() -> None:
    found = [(one.line, one.name, one.value) for one in instructions("from a\n\nRUN b \\\n  # c\n  d\nCMD e")]
    assert found == [(1, "FROM", "a"), (3, "RUN", "b d"), (6, "CMD", "e")]


def test_check_reads_the_dockerfile_of_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    participants.cache_clear()
    folder = tmp_path / "resources/teams/oca"
    folder.mkdir(parents=True)
    entry = {
        "team": "Oca",
        "track": "a100",
        "kind": "server",
        "base_model": {"hub": f"mistralai/Mistral-7B-v0.1@{COMMIT}"},
        "server": {"dockerfile": "resources/teams/oca"},
    }
    (tmp_path / "oca.yaml").write_text(yaml.safe_dump(entry))
    competition = load_competition(ROOT / "config/neurips2023.yaml")
    against = CheckedAgainst.of(competition).model_copy(
        update={"rules": str(ROOT / "config/rulesets/neurips2023.yaml")}
    )
    (missing,) = check_file(tmp_path / "oca.yaml", against).violations
    assert str(missing).startswith("server.dockerfile: resources/teams/oca has no Dockerfile; put one there")
    (folder / "Dockerfile").write_text("FROM scratch\nRUN pip install torch\n")
    checked = check_file(tmp_path / "oca.yaml", against)
    assert [one.rule for one in checked.notices] == ["dockerfile"]
    (folder / "Dockerfile").write_text("FROM scratch\nENV HF_TOKEN=abcdefgh\n")
    assert [one.rule for one in check_file(tmp_path / "oca.yaml", against).violations] == ["credentials"]

"""Hub datasets as sources: fetched from a hub on this machine, then read from the cache alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.support.curation import pairs_of, recipe

FIRST, SECOND, THIRD = ("a" * 40, "b" * 40, "c" * 40)
REVISIONS = {
    FIRST: [{"prompt": "Who won?", "completion": "The owl."}, {"prompt": "When?", "completion": "In July."}],
    SECOND: [{"prompt": "Who won?", "completion": "The eagle."}],
}


class Hub(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks of palio/contrade, a dataset of one file, train.jsonl."""

    def do_GET(self) -> None:
        revision = next((known for known in REVISIONS if known in self.path), None)
        if revision is None:
            self._answer(404, b"{}")
            return
        content = "".join(json.dumps(row) + "\n" for row in REVISIONS[revision]).encode()
        digest = hashlib.sha1(content).hexdigest()  # noqa: S324 (as git's own)
        file = {"type": "file", "path": "train.jsonl", "size": len(content), "oid": digest}
        if self.path.endswith("/resolve/" + revision + "/train.jsonl"):
            self._answer(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": revision})
        elif "/tree/" in self.path:
            self._answer(200, json.dumps([] if "/data?" in self.path else [file]).encode())
        elif self.path.startswith("/api/datasets/palio/contrade"):
            info = {"id": "palio/contrade", "sha": revision, "siblings": [{"rfilename": "train.jsonl"}]}
            self._answer(200, json.dumps(info).encode())
        else:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read(revision: str, out: Path, source: Mapping[str, str] | None = None, **environment: str) -> str:
    """Curate the dataset at a revision in a process of its own; its last line of output."""
    given = recipe([{"hub": f"palio/contrade@{revision}", **(source or {})}]).model_dump_json()
    program = (
        "import sys; from pathlib import Path; from palio.config import DatasetRecipe; "
        "from palio.errors import BadInput; from tests.support.curation import curate\n"
        "try: curate(DatasetRecipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
        "except BadInput as fault: print(fault)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, given, str(out)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The cache of somebody who has fetched both revisions, the second one last."""
    folder = tmp_path_factory.mktemp("hub")
    with hub() as address:
        for revision in (FIRST, SECOND):
            said = read(revision, folder / revision, HF_HOME=str(folder / "home"), HF_ENDPOINT=address)
            assert not said
    return str(folder / "home")


@pytest.mark.parametrize("revision", [FIRST, SECOND])
def test_a_hub_dataset_in_the_cache_is_read_offline_at_its_own_revision(
    revision: str, home: str, tmp_path: Path
) -> None:
    assert not read(revision, tmp_path / "dataset", HF_HOME=home, HF_HUB_OFFLINE="1")
    rows = {(row["prompt"], row["completion"]) for row in REVISIONS[revision]}
    assert set(pairs_of(tmp_path / "dataset/train.parquet")) == rows


def test_offline_a_revision_that_is_not_in_the_cache_is_never_replaced_by_another(
    home: str, tmp_path: Path
) -> None:
    said = read(THIRD, tmp_path / "dataset", HF_HOME=home, HF_HUB_OFFLINE="1")
    assert said == (
        f"hub:palio/contrade@{THIRD}: is not in the cache, which has {SECOND} of it; "
        "fetch it on a node with network\n"
    )
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(
    ("source", "there"), [({"split": "test"}, "['train']"), ({"config": "italian"}, "default")]
)
def test_a_wrong_split_or_config_is_told_with_those_that_there_are(
    source: dict[str, str], there: str, home: str, tmp_path: Path
) -> None:
    said = read(SECOND, tmp_path / "dataset", source, HF_HOME=home, HF_HUB_OFFLINE="1")
    (value,) = source.values()
    assert f"hub:palio/contrade@{SECOND}: could not be read" in said
    assert value in said
    assert there in said
    with hub() as address:
        said = read(FIRST, tmp_path / "other", source, HF_HOME=str(tmp_path), HF_ENDPOINT=address)
    assert value in said
    assert there in said

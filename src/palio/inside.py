"""What runs in the room of a model that brings code of its own, and the only program that imports such code.

    python -m palio.inside
    /job.json    {"function": "merge", "given": {…}, "code": {"modeling_x.py": "<sha256>"}, "model": …}

It imports the code, calls one of the functions below, and reports to /output/report.json what that returned
or raised. `palio.sandbox.model_room` starts it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from palio.errors import Crashed, PalioError
from palio.layout import RoomFolder
from palio.model_code import import_code
from palio.sandbox.model_room import ADAPTER, BASE_MODEL, JOB, PACKAGE, REPORT, described
from palio.sandbox.room import OUTPUT


def examine(weights: bool) -> dict[str, Any]:
    from palio.causal_model import examine as examine_model

    return examine_model(Path(BASE_MODEL), weights=weights).model_dump()


def config() -> dict[str, Any]:
    """The config with the defaults of its class."""
    from transformers import AutoConfig

    found: dict[str, Any] = AutoConfig.from_pretrained(BASE_MODEL, trust_remote_code=False).to_dict()
    return found


def preview(entry: dict[str, Any], track: dict[str, Any]) -> list[str]:
    from palio.config import Entry, Track
    from palio.participant.preview import preview_of

    return list(preview_of(Path(BASE_MODEL), Entry.model_validate(entry), Track.model_validate(track)))


def train(**given: Any) -> dict[str, Any]:
    from palio.training.confined import train_inside

    return train_inside(**given)


def merge(trained: dict[str, Any], threads: int | None) -> list[float | None]:
    """Write the merged model to /output/model."""
    import torch

    from palio.packaging.package import write_tuned
    from palio.records import AdapterManifest

    torch.set_num_threads(threads or torch.get_num_threads())
    adapter = AdapterManifest.model_validate(trained)
    return list(write_tuned(Path(BASE_MODEL), Path(ADAPTER), adapter, RoomFolder(Path("/")).model))


def serving_of(threads: int | None) -> list[str | int]:
    import torch

    from palio.serving.model import serving_of as serving_of_package

    torch.set_num_threads(threads or torch.get_num_threads())
    return list(serving_of_package(Path(PACKAGE)))


def same_answers(trained: dict[str, Any]) -> str:
    from palio.packaging.verify import Fault
    from palio.packaging.verify import same_answers as compare
    from palio.records import AdapterManifest

    adapter = AdapterManifest.model_validate(trained)
    try:
        return compare(Path(PACKAGE), Path(BASE_MODEL), Path(ADAPTER), adapter)
    except Fault as fault:
        raise Crashed(str(fault)) from None


def serve(**settings: Any) -> None:
    from palio.serving.app import serve as serve_package

    serve_package(Path(PACKAGE), host="127.0.0.1", port=int(os.environ["PORT"]), **settings)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (examine, config, preview, train, merge, serving_of, same_answers, serve)
}


def main(job: dict[str, Any]) -> int:
    """Do a job; returns the exit code."""
    code = 0
    try:
        import_code(Path(job["model"]), job["code"])
        report = {"result": FUNCTIONS[job["function"]](**job["given"])}
    except PalioError as error:
        report, code = {"error": described(error)}, error.exit_code
        print(f"error: {error}", file=sys.stderr, flush=True)
    if Path(OUTPUT).is_dir():
        Path(OUTPUT, REPORT).write_text(json.dumps(report), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(JOB).read_bytes())))

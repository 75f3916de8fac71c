"""The official validator on a folder, in its own environment (`make crate-env`) and without a network.

    .crate/bin/python tests/support/validate_crate.py FOLDER required|recommended

It prints a line for every violation. The profiles are in the validator's package; the JSON-LD context, which
it would download, is the one in the package `rocrate`, put into the validator's cache.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import requests
from requests_cache import CachedSession
from rocrate_validator.models import Severity, ValidationSettings
from rocrate_validator.services import validate
from urllib3 import HTTPResponse

CONTEXT = "https://w3id.org/ro/crate/1.1/context"


class Packaged(requests.adapters.BaseAdapter):
    """Answers with the context of the package instead of the host's."""

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        spec = importlib.util.find_spec("rocrate")  # only its data: what it imports is not installed
        assert spec and spec.submodule_search_locations
        context = Path(spec.submodule_search_locations[0]) / "data/ro-crate.jsonld"
        reply = HTTPResponse(
            context.open("rb"), {"Content-Type": "application/ld+json"}, 200, preload_content=False
        )
        return requests.adapters.HTTPAdapter().build_response(request, reply)

    def close(self) -> None:
        pass


def main(folder: str, severity: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        session = CachedSession(f"{cache}/http", backend="sqlite")
        session.mount(CONTEXT, Packaged())
        assert f'"@id": "{CONTEXT}"' in session.get(CONTEXT).text
        settings = ValidationSettings(
            rocrate_uri=str(Path(folder).resolve()),
            profile_identifier="ro-crate-1.1",
            requirement_severity=Severity[severity.upper()],
            cache_path=Path(cache) / "http",
            offline=True,
        )
        for issue in validate(settings).get_issues():
            print(
                f"{issue.severity.name} {issue.check.identifier}: {issue.message} ({issue.violatingEntity})"
            )


main(*sys.argv[1:])

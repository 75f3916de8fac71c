"""Where benchmarks find the questions that HELM asks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HELM_DATA = os.environ.get("PALIO_HELM_DATA", "resources/stages/open/store/data/scenarios")
"""What `palio fetch-data --stage open --competition config/neurips2023.yaml` fills; or another place."""


def absent(path: Path) -> str:
    """Return the error message for data that does not exist."""
    fix = "`palio fetch-data --stage open --competition config/neurips2023.yaml` brings it"
    return f"{path} does not exist; {fix}"


def helm_data(value: str) -> Path:
    """Return a file or folder of HELM's data, as an argument's type; ArgumentTypeError if it is absent."""
    if not Path(value).exists():
        raise argparse.ArgumentTypeError(absent(Path(value)))
    return Path(value)

"""What the installed HELM knows: its version, run specs, and which way a metric is better.

Read from HELM's sources: importing its registry takes seconds, and every start of the workflow asks.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from importlib import metadata
from pathlib import Path

from palio.config import Competition
from palio.errors import BadInput
from palio.layout import STAGES

_RUN_SPEC = re.compile(r"""@run_spec_function\(\s*["'](\w+)""")
_METRIC_LINE = re.compile(r"^\s*(?:- name: (\S+)|lower_is_better: (true|false))", re.MULTILINE)


def helm_version() -> str:
    return metadata.version("crfm-helm")


def _helm_files(pattern: str) -> list[Path]:
    """Files of the installed package `helm`."""
    spec = importlib.util.find_spec("helm")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return [path for folder in folders for path in Path(folder).glob(pattern)]


@functools.cache
def known_run_specs() -> frozenset[str]:
    """Names that a run entry may begin with: HELM's and those of installed plug-ins."""
    sources = _helm_files("benchmark/run_specs/**/*.py")
    for plug_in in metadata.entry_points(group="helm"):
        spec = importlib.util.find_spec(plug_in.module)
        sources += [Path(spec.origin)] if spec and spec.origin else []
    return frozenset(name for path in sources for name in _RUN_SPEC.findall(path.read_text(encoding="utf-8")))


@functools.cache
def metric_directions() -> dict[str, bool]:
    """`higher_is_better` by the name of each metric on whose direction HELM's schemas agree."""
    directions: dict[str, set[bool]] = {}
    for path in _helm_files("benchmark/static/schema_*.yaml"):
        name = ""
        for named, lower in _METRIC_LINE.findall(path.read_text(encoding="utf-8")):
            if named:
                name = named
            else:
                directions.setdefault(name, set()).add(lower == "false")
    return {name: values.pop() for name, values in directions.items() if len(values) == 1}


def check_directions(competition: Competition, file: str) -> None:
    """Check every metric's `higher_is_better` against HELM's schemas.

    Raises:
        BadInput: it contradicts HELM, or neither HELM nor the config says.
    """
    for stage in STAGES:
        for name, scenario in competition.stage(stage).scenarios.items():
            for title, metric in scenario.metrics.items():
                key = f"stages.{stage}.scenarios.{name}.metrics.{title}.higher_is_better"
                known = metric_directions().get(metric.metric)
                if known is None and "higher_is_better" not in metric.model_fields_set:
                    why = f"HELM does not say which way {metric.metric} is better"
                    near = difflib.get_close_matches(metric.metric, metric_directions(), 1)
                    meant = f"if you mean {near[0]}, correct metric; else " if near else ""
                    raise BadInput(file, key, why=why, fix=f"{meant}write true or false")
                if known is not None and known != metric.higher_is_better:
                    better = "higher" if known else "lower"
                    why = f"HELM says of {metric.metric} that {better} is better"
                    fix = f"write {str(known).lower()}"
                    raise BadInput(file, key, metric.higher_is_better, why=why, fix=fix)

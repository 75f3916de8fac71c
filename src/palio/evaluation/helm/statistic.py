"""Values of a finished HELM run: aggregates from stats.json, instances from per_instance_stats.json.

Both files hold HELM's `Stat` (metrics/statistic.py): a name of metric, split and perturbation, and a mean.
Measured times are left out: they are not the same twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from palio.evaluation.helm.folder import RunFolder

_RUNTIME = "_runtime"
_WORST_CASES = ("robustness", "fairness")


def statistics(run: RunFolder) -> Iterator[dict[str, Any]]:
    """metric, split, perturbation, value of every aggregate of a complete run.

    Aggregates over perturbations (`computed_on: worst`) are kept only if the inputs were perturbed:
    otherwise HELM repeats the plain value under their name.
    """
    for stat in run.read("stats.json"):
        yield from _rows(run, stat, stat["name"].get("perturbation"))


def instance_statistics(run: RunFolder) -> Iterator[dict[str, Any]]:
    """instance, metric, split, perturbation, value per evaluation instance of a complete run."""
    for instance in run.read("per_instance_stats.json"):
        if not _believed(run, instance.get("perturbation")):
            continue
        for stat in instance["stats"]:
            perturbation = stat["name"].get("perturbation") or instance.get("perturbation")
            for row in _rows(run, stat, perturbation):
                yield {"instance": str(instance["instance_id"]), **row}


def _rows(
    run: RunFolder, stat: dict[str, Any], perturbation: dict[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """One row, or none where the statistic is a time or not to be believed."""
    name = stat["name"]
    if _believed(run, perturbation) and not name["name"].endswith(_RUNTIME):
        mean = stat.get("mean")
        yield {
            "metric": name["name"],
            "split": name.get("split") or "",
            "perturbation": _perturbation_name(perturbation),
            # a server's log-probabilities may bring infinities and NaN into a mean
            "value": mean if mean is not None and math.isfinite(mean) else None,
        }


def _believed(run: RunFolder, perturbation: dict[str, Any] | None) -> bool:
    return run.perturbed or not perturbation


def _perturbation_name(perturbation: dict[str, Any] | None) -> str | None:
    """Name of a perturbation; None for the plain input.

    `robustness` and `fairness` are the worst case over their perturbations and the plain input. A single
    perturbation has its bare name, and `<name>:worst` with the plain input, `<name>:original` without it.
    """
    if not perturbation:
        return None
    name = str(perturbation["name"])
    computed_on = perturbation.get("computed_on", "perturbed")
    return name if computed_on == "perturbed" or name in _WORST_CASES else f"{name}:{computed_on}"

"""Which way a metric is better is HELM's to say; the config is held against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from palio.config import load_competition
from palio.errors import BadInput
from palio.evaluation.helm import check_directions, metric_directions

ROOT = Path(__file__).parents[2]


def config(name: str = "config.yaml") -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "config" / name).read_text())
    return content


def check(content: dict[str, Any]) -> None:
    check_directions(load_competition(content), "config.yaml")


def with_metric(**metric: Any) -> dict[str, Any]:
    content = config()
    content["stages"]["open"]["scenarios"]["pattern_match"]["metrics"] = {"m": metric}
    return content


@pytest.mark.parametrize("name", ["config.yaml", "neurips2023.yaml"])
def test_the_shipped_competitions_agree_with_helm(name: str) -> None:
    check(config(name))


def test_a_direction_that_contradicts_helm_is_named_with_its_fix() -> None:
    with pytest.raises(BadInput) as caught:
        check(with_metric(metric="exact_match", higher_is_better=False))
    assert str(caught.value) == (
        "config.yaml: stages.open.scenarios.pattern_match.metrics.m.higher_is_better is False: "
        "HELM says of exact_match that higher is better; write true"
    )


def test_a_metric_where_lower_is_better_must_say_so() -> None:
    assert metric_directions()["perplexity"] is False
    with pytest.raises(BadInput, match="lower is better; write false"):
        check(with_metric(metric="perplexity"))


def test_a_metric_unknown_to_helm_needs_a_direction() -> None:
    with pytest.raises(BadInput, match=r"HELM does not say which way wit is better; .*write true or false"):
        check(with_metric(metric="wit"))
    check(with_metric(metric="wit", higher_is_better=False))

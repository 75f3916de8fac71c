"""The model card of a package: its lineage and its limits.

It holds no date, host or path, so equal content gives equal text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from palio.records import AdapterManifest, BaseModelManifest
from palio.text import markdown_table

LIMITS = (
    "It was made for a competition of English prompts, prompt and completion together at most 2048 tokens.",
    "It was tuned to score there. Nobody has checked it for safety, bias or truth beyond the scores.",
    "The base model's license and limits still apply.",
)


def model_card(
    entry: str,
    competition: str,
    base: BaseModelManifest,
    trained: AdapterManifest | None,
    facts: Mapping[str, Any],
) -> str:
    """Return README.md, with the hub's metadata first. `facts` is the metadata of the base model's card."""
    address = base.source.hub or base.source.path or base.source.gguf or ""
    name = Path(address).name if base.source.path else address
    sections = [
        f"---\n{yaml.safe_dump(_metadata(competition, base, facts), sort_keys=False)}---",
        f"# {entry}",
        f"Entry `{entry}` of the competition `{competition}`, packaged by Palio.",
        _snippet(base.code),
        "## Lineage",
        markdown_table(
            ("", ""),
            [("Base model", name), ("Base model sha256", f"`{base.fingerprint}`"), *_training(trained)],
        ),
    ]
    if trained is not None:
        recipe = json.dumps(trained.recipe, indent=2, sort_keys=True)
        sections += [
            "## Data and recipe",
            f"{_rows(trained)}; sources, licenses and operations are listed in DATA_CARD.md.",
            f"```json\n{recipe}\n```",
        ]
    sections += ["## Limits", "\n".join(f"- {limit}" for limit in LIMITS)]
    return "\n\n".join(sections) + "\n"


def _snippet(code: Mapping[str, str]) -> str:
    """Return how to load the package, and what runs then."""
    trust = ", trust_remote_code=True" if code else ""
    snippet = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("package"{trust})\n'
        'tokenizer = AutoTokenizer.from_pretrained("package")\n```'
    )
    if not code:
        return snippet
    files = ", ".join(f"`{name}`" for name in sorted(code))
    return f"{snippet}\n\nThis runs the base model's own code, {files} of the package, with all your rights."


def _rows(trained: AdapterManifest) -> str:
    """Return what is known of the rows: of a team's own program only how many it was given."""
    if trained.rows_too_long is None:
        return f"{trained.rows} rows"
    return (
        f"{trained.rows} rows ({trained.rows_held_out} more were held out, {trained.rows_too_long} too long, "
        f"{trained.rows_cut} cut between turns)"
    )


def _metadata(competition: str, base: BaseModelManifest, facts: Mapping[str, Any]) -> dict[str, Any]:
    license_id = facts.get("license")
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": "en",
        "tags": ["palio", competition],
    }
    if base.source.hub:
        metadata["base_model"] = base.source.hub.partition("@")[0]
    if isinstance(license_id, str):
        metadata["license"] = license_id
        if isinstance(facts.get("license_name"), str):
            metadata["license_name"] = facts["license_name"]
    return metadata


def _training(trained: AdapterManifest | None) -> list[tuple[str, str]]:
    if trained is None:
        return [("Fine-tuning", "none")]
    method = trained.recipe.get("method", "own program")
    quantized = []
    if trained.quantized is not None:
        quantized = [("Quantized in training", f"{trained.quantized:.1%} of the parameters")]
    return [
        ("Dataset sha256", f"`{trained.dataset_sha256}`"),
        (
            "Fine-tuning",
            f"{method}, {trained.steps} of {trained.planned_steps} steps on {trained.rows} rows, "
            f"{trained.state.replace('_', ' ')}",
        ),
        *quantized,
        ("Adapter fingerprint", f"`{trained.fingerprint}`"),
    ]

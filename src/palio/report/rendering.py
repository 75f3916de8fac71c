"""HTML from the templates in `templates/`: one style, one policy, everything escaped.

A page's content policy allows nothing but its own style sheet and script, by hash; `parts` adds scripts that
lie beside the page and hold data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from typing import Any

from jinja2 import BytecodeCache, Environment, PackageLoader, StrictUndefined
from jinja2.bccache import Bucket
from markupsafe import Markup

from palio import __version__
from palio.markup import html, visible
from palio.report.drawing import css
from palio.report.files import Missing
from palio.text import duration


class CompiledTemplates(BytecodeCache):
    """Templates that this process has compiled. An environment of each page's own must not compile them
    again: for a site that is most of its time. Nor may pages share one: it keeps imported macros with the
    content they were first given."""

    def __init__(self) -> None:
        self._code: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self._code:
            bucket.bytecode_from_string(self._code[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._code[bucket.key] = bucket.bytecode_to_string()


COMPILED = CompiledTemplates()


def render(template: str, script: str, *, parts: bool = False, **content: Any) -> str:
    """Return the page of a template with `content`; `script` is the name of its script."""
    environment = Environment(
        loader=PackageLoader("palio.report", "templates"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        bytecode_cache=COMPILED,
    )
    environment.tests["missing"] = lambda value: isinstance(value, Missing)
    environment.filters |= {
        "duration": duration,
        "bytes": _bytes,
        "count": _count,
        "breakable": _breakable,
        "data": _data,
    }
    style, code = css() + _asset("style.css"), _asset(script)
    policy = {
        "default-src": "'none'",
        "style-src": f"'sha256-{_hash(style)}'",
        "script-src": f"'sha256-{_hash(code)}'" + (" 'self'" if parts else ""),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # In imported templates too, which do not see what a template is given.
    environment.globals |= content | {
        "version": __version__,
        "policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        # Our own files, allowed by hash: a script that an entry smuggles into a text does not run.
        "style": Markup(style),  # noqa: S704
        "script": Markup(code),  # noqa: S704
    }
    return environment.get_template(template).render()


def _asset(name: str) -> str:
    return (resources.files("palio.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _breakable(text: str) -> Markup:
    """Let a long id wrap after each underscore and slash."""
    return Markup("<wbr>").join(html(part) for part in re.split(r"(?<=[_/])", text))


def _count(number: Any) -> str:
    return f"{number:,}".replace(",", "\u202f")


def _data(payload: Any) -> Markup:
    """Return JSON for a data block: without `<`, nothing in it ends the block."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))  # noqa: S704

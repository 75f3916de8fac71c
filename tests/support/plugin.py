"""Packages that extend Palio by an entry point, as the documentation shows them."""

from __future__ import annotations

import tomllib
from pathlib import Path


def install(site: Path, pyproject: str, **modules: str) -> None:
    """Lay a package out as pip does: its modules, by name, and the entry points of its distribution."""
    project = tomllib.loads(pyproject)["project"]
    name, points = project["name"], project["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in points.items()]
    information = site / f"{name.replace('-', '_')}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("\n".join(lines))
    for module, code in modules.items():
        (site / f"{module}.py").write_text(code)

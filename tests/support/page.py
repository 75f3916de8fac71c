"""What no page may have, whatever it shows: faint text, parts beside a narrow screen, what axe-core finds."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest

from tests.support.chromium import Page

CONTRAST = """
(() => {
  const parse = (text) => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const light = (c) => {
    const part = (v) => (v <= 10 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = c.map(part);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] === 1) return color;
    }
  };
  const bad = new Set();
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
    if (!own || ["SCRIPT", "STYLE", "OPTION", "title"].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    const ink = parse(node.closest("svg") ? style.fill : style.color);
    const [x, y] = [light(ink), light(behind(node))].sort((a, b) => b - a);
    if ((x + 0.05) / (y + 0.05) < 4.5) bad.add(`${node.tagName} ${ink} ${node.textContent.slice(0, 30)}`);
  }
  return [...bad];
})()
"""

OUTSIDE = """
(() => {
  const bad = [];
  const say = (node, why) => bad.push(`${node.tagName}.${node.className?.baseVal ?? node.className}: ${why}: `
    + node.textContent.trim().slice(0, 40));
  if (document.documentElement.scrollWidth > WIDTH) bad.push("the page scrolls sideways");
  for (const node of document.querySelectorAll("body *")) {
    const style = getComputedStyle(node);
    if (["SCRIPT", "STYLE", "OPTION", "title"].includes(node.tagName)) continue;
    if (!node.getClientRects().length) continue;
    const { left, right, width } = node.getBoundingClientRect();
    if (width && (right > WIDTH + 0.5 || left < -0.5)) say(node, `from ${left} to ${right}`);
    if (style.overflowX === "auto" && node.scrollWidth > node.clientWidth + 1) say(node, "scrolls sideways");
    if (node.tagName === "text") {
      const size = parseFloat(style.fontSize) * node.getScreenCTM().a;
      const upright = node.getAttribute("transform")?.startsWith("rotate");
      if (!upright && size < SMALLEST) say(node, `letters of ${size.toFixed(1)} px`);
    }
  }
  return [...new Set(bad)].slice(0, 20);
})()
"""


SERIOUS = """
(async () => {
  const found = await axe.run(document, { resultTypes: ["violations"] });
  if (found.passes.length < 10) return [`axe has looked at ${found.passes.length} rules only`];
  return found.violations.filter((one) => ["serious", "critical"].includes(one.impact))
    .flatMap((one) => one.nodes.map((node) => `${one.id}: ${node.html.slice(0, 120)}`));
})()
"""


@cache
def _axe() -> str:
    """The script of axe-core, from a package that is installed for it; nothing of the package runs."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no axe-core here: `make env` installs axe-playwright-python")
    return (Path(spec.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


def accessibility_faults(page: Page) -> list[str]:
    """What axe-core calls a serious or critical violation: the rule and the element."""
    page.do(f"{_axe()}; undefined")
    found: list[str] = page.do(SERIOUS)
    return found


def contrast_faults(page: Page) -> list[str]:
    """Texts whose contrast is less than the 4.5 that WCAG AA asks for."""
    found: list[str] = page.do(CONTRAST)
    return found


def outside_of(page: Page, width: int, smallest: float = 9.0) -> list[str]:
    """What is outside a screen of `width` pixels, must be scrolled sideways to be read, or is too small."""
    found: list[str] = page.do(OUTSIDE.replace("WIDTH", str(width)).replace("SMALLEST", str(smallest)))
    return found

"""`palio status --html` in a real browser."""

from __future__ import annotations

from pathlib import Path

from palio.operating.status import EntryStatus, Status, StepState, StepStatus
from palio.operating.status_view import html_page
from palio.pipeline import STEPS
from tests.support.chromium import chromium_page
from tests.support.page import accessibility_faults, contrast_faults, outside_of
from tests.support.report import HOSTILE

NAMES = [step.name for step in STEPS if step.name != "image"]  # of an entry without a Dockerfile


def entry(name: str, deciding: StepStatus, after: StepState) -> EntryStatus:
    at = NAMES.index(deciding.step)
    done = [StepStatus(step, "done", seconds=60.0) for step in NAMES[:at]]
    behind = [StepStatus(step, after, wait=f"behind {deciding.step}") for step in NAMES[at + 1 :]]
    return EntryStatus("laptop", name, "team", [*done, deciding, *behind])


def status() -> Status:
    failed = StepStatus("open", "failed", reason=f"crashed: {HOSTILE}", log="open.log")
    running = StepStatus("finetune", "running", node="node17", seconds=7200, used=7000, budget=86400)
    queued = StepStatus("finetune", "queued", reason="Priority")
    asked = StepStatus("check", "withdrawn", reason="asked to")
    entries = [
        entry("crashed_again_and_again_with_a_long_name", failed, "waiting"),
        entry("running", running, "waiting"),
        entry("queued", queued, "waiting"),
        entry("withdrawn", asked, "withdrawn"),
    ]
    return Status("demo", "Palio demo", 0.0, "host1", entries)


def test_it_is_read_everywhere_asks_nobody_and_can_be_kept_from_reloading(tmp_path: Path) -> None:
    path = tmp_path / "status.html"
    path.write_text(html_page(status()))
    with chromium_page() as page:
        for width, dark in ((1400, False), (400, True)):
            page.open(f"file://{path}", width=width, dark=dark)
            assert contrast_faults(page) == []
            assert accessibility_faults(page) == []
        assert outside_of(page, 400) == []
        assert HOSTILE in page.do("document.querySelector('dd').innerText"), "shown, never run"
        assert page.do("document.querySelector('#reload').getClientRects().length") == 1
        assert page.complaints == []
        assert {*page.requests} <= {f"file://{path}", "about:blank"}
        page.screenshot(tmp_path / "phone.png")
        page.open(f"file://{path}", width=1400)
        page.screenshot(tmp_path / "desktop.png")


def test_axe_would_find_a_picture_without_a_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        html_page(status()).replace("<main>", '<main><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">')
    )
    with chromium_page() as page:
        page.open(f"file://{path}")
        assert any(fault.startswith("image-alt: <img") for fault in accessibility_faults(page))

"""The report in a real browser: no errors, no requests, readable on a phone and on a desk, light and dark."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeattn.deploy.run_report import report_run

sys.path.append(str(Path(__file__).parent))
from browser import MISSING, Browser, open_browser
from report_samples import write_run, write_work

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

WIDTHS = (390, 1440)
CONTRAST = 4.5
"""Least ratio of luminances for text of usual size (WCAG 2.1, 1.4.3)."""

SMALLEST = 11.5
"""Least size of text in CSS pixels."""

LAYOUT = Path(__file__).with_name("page_layout.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with its analyses and a device."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "run").mkdir()
    run = write_run(folder / "run")
    work = write_work(folder / "orin-7" / "work", json.loads((run / "manifest.json").read_text()))
    return report_run(run, [work], folder / "page.html").path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests."""
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize("width", WIDTHS)
def test_readable_light_and_dark(browser: Browser, page: Path, width: int) -> None:
    shades = {}
    for dark in (False, True):
        browser.look(page, width, dark=dark)
        found: dict[str, Any] = browser.evaluate(LAYOUT)
        assert found["inner"] == width
        assert found["width"] <= width, "the page scrolls sideways"
        assert found["outside"] == [], "something outside a scrolling box is wider than the page"
        assert found["faintest"][0] >= CONTRAST, found["faintest"]
        assert found["smallest"] >= SMALLEST
        assert found["overlapping"] == 0, "labels of an axis overlap"
        assert found["thin"] == []
        assert found["drawn"] == found["charts"] >= 5
        assert found["broken"] == 0
        with Image.open(io.BytesIO(browser.screenshot())) as image:
            assert image.width == width
            shades[dark] = np.asarray(image.convert("L"), np.float64)
    for shade in shades.values():
        assert len(np.unique(shade)) > 20, "the picture is empty"
    assert shades[False].mean() > 180
    assert shades[True].mean() < 80


def test_offline_and_without_errors(browser: Browser, page: Path) -> None:
    browser.look(page, 390)
    assert browser.console() == []
    browser.requests()
    browser.look(page, 1440)
    asked = [address for address in browser.requests() if not address.startswith("data:")]
    assert asked == [page.resolve().as_uri()]
    assert browser.console() == []


def test_the_check_sees_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    """A page with an error, a request, a wide table and pale text is found out."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><body style='margin:0'><p style='color:#bbb;background:#fff'>pale</p>"
        "<table style='width:2000px'><tr><td>wide</td></tr></table>"
        "<img src='http://127.0.0.1:9/x.png' alt=''><script>nowhere()</script>"
    )
    browser.console()
    browser.requests()
    browser.look(bad, 390)
    found = browser.evaluate(LAYOUT)
    assert found["width"] > 390
    assert found["outside"]
    assert found["faintest"][0] < CONTRAST
    assert found["broken"] == 1
    assert any("nowhere is not defined" in message for message in browser.console())
    assert any("127.0.0.1:9" in address for address in browser.requests())

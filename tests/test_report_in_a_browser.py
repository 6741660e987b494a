"""The report in a real browser: no errors, no requests, readable on a phone and on a desk, light and dark."""

from __future__ import annotations

import io
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

LAYOUT = """
const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) if (walker.currentNode.data.trim()) texts.push(walker.currentNode.parentElement);
const seen = [...new Set(texts)].filter(e => e.getClientRects().length);
const parts = colour => colour.match(/[\\d.]+/g).map(Number);
const luminance = colour => parts(colour).slice(0, 3).map(c => c / 255)
  .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const ground = e => { while (e) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; e = e.parentElement; } return "rgb(255, 255, 255)"; };
const contrast = e => { const [a, b] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
const faint = seen.map(e => [contrast(e), e.textContent.slice(0, 40)]).sort((a, b) => a[0] - b[0])[0];
const small = Math.min(...seen.map(e => parseFloat(getComputedStyle(e).fontSize)));
const outside = [...document.body.querySelectorAll("*")].filter(e => !e.closest(".scroll") && !e.closest("svg"))
  .filter(e => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
const crossing = [...document.querySelectorAll(".ticks, .heights")].filter(axis => { const r = [...axis.children].map(e => e.getBoundingClientRect());
  return r.some((a, i) => r.slice(i + 1).some(b => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)); }).length;
const thin = [...document.querySelectorAll(".row .label")].filter(e => e.getBoundingClientRect().width < 120).map(e => e.textContent);
const drawn = [...document.querySelectorAll(".row svg, .curves svg")].map(e => e.getBoundingClientRect()).filter(r => r.width > 150 && r.height > 10).length;
return {faint, small, outside, crossing, thin, drawn, charts: document.querySelectorAll(".row svg, .curves svg").length,
  width: document.documentElement.scrollWidth, inner: innerWidth, broken: [...document.images].filter(i => !i.naturalWidth).length};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with its analyses and a device."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "run").mkdir()
    run, work = write_run(folder / "run"), write_work(folder / "orin-7" / "work")
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
        assert found["faint"][0] >= CONTRAST, found["faint"]
        assert found["small"] >= SMALLEST
        assert found["crossing"] == 0, "labels of an axis overlap"
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
    assert found["faint"][0] < CONTRAST
    assert found["broken"] == 1
    assert any("nowhere is not defined" in message for message in browser.console())
    assert any("127.0.0.1:9" in address for address in browser.requests())

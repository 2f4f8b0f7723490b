"""The page in a real browser, on a phone and on a wide screen."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")

# Put into a copy of the page, which itself has no scripts and forbids them.
MEASURE = """
<script>
addEventListener("load", () => {
  const size = one => { const box = one.getBoundingClientRect(); return [box.width, box.height]; };
  const root = document.documentElement;
  const drawn = "figure svg path, figure svg image, figure svg use";
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    page: Math.max(root.scrollWidth, document.body.scrollWidth),
    figures: [...document.querySelectorAll("figure svg")].map(size),
    images: [...document.querySelectorAll("figure svg image")].map(size),
    drawn: [...document.querySelectorAll(drawn)].filter(one => size(one).some(x => x > 0)).length,
    tables: [...document.querySelectorAll("table")].map(size),
    boxes: [...document.querySelectorAll(".scroll")].map(box => [box.clientWidth, box.scrollWidth]),
  }), "*");
});
</script>
"""
# Chromium makes no window narrower than 500 pixels, but a frame of any width.
FRAME = """
<!DOCTYPE html>
<title></title>
<script>addEventListener("message", event => document.title = event.data);</script>
<iframe src="{page}" width="{width}" height="900" style="border: 0"></iframe>
"""


def browse(page: Path) -> subprocess.CompletedProcess:
    """The page as the browser has it when all is loaded, and what the browser says of it."""
    profile = page.with_name(f"profile-{page.stem}")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    flags += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", "--window-size=1600,1000"]
    command = [BROWSER, *flags, "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_the_browser_has_no_error_to_tell(whole: Path) -> None:
    told = browse(whole)
    assert "</table>" in told.stdout
    assert not [line for line in told.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [390, 1440])
def test_every_figure_and_table_shows_and_the_page_is_no_wider_than_its_window(whole: Path, width: int) -> None:
    text = whole.read_text(encoding="utf-8")
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    copy, frame = (whole.with_name(f"{name}-{width}.html") for name in ("measured", "frame"))
    copy.write_text(bare.replace("</head>", f"{MEASURE}</head>"), encoding="utf-8")
    frame.write_text(FRAME.format(page=copy.name, width=width), encoding="utf-8")
    title = re.search(r"<title>(\{.*?\})</title>", browse(frame).stdout, re.DOTALL)
    assert title, "the page did not load"
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found["width"] == width
    # Wide tables and figures scroll inside of their own boxes.
    assert found["page"] <= width
    assert max(inside - outside for outside, inside in found["boxes"]) > 0 or width > 1000
    assert len(found["figures"]) == text.count("<figure") > 5 and found["images"] and found["drawn"] > 500
    assert all(x > 100 and y > 50 for x, y in found["figures"]) and all(x > 0 and y > 0 for x, y in found["images"])
    assert len(found["tables"]) == text.count("<table") > 10 and all(x > 0 and y > 0 for x, y in found["tables"])

"""The page that verify writes, looked at in a real browser."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from norm_plugin.verify import page, verdict
from tests.verify.samples import answer, outcome, row

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {
    "engine": "vllm", "version": "0.32.0", "backend": "native", "device": "cpu", "dtype": "bfloat16", "mode": "eager",
    "tp": 1, "date": "2026-11-21T12:00:00+00:00",
    "command": "norm-plugin verify -- vllm serve '/models/a b<c' --enforce-eager",
    "versions": {"norm_plugin": "0.1.0", "torch": "2.13.0", "triton": "3.7.1", "GPU": "NVIDIA H100", "driver": "580.1"},
    "prompts": 2, "max_tokens": 4, "floor": "order", "flags": {"NORM_PLUGIN": "native"}, "seconds": 12.0,
}  # fmt: skip

#: Added to the page by the test: what the browser made of it, as the title.
MEASURE = """<script>
const boxes = [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect());
const svg = document.querySelector('svg').getBoundingClientRect();
const inside = boxes.every(b =>
  b.left >= svg.left && b.right <= svg.right && b.top >= svg.top && b.bottom <= svg.bottom);
const heights = kind => [...document.querySelectorAll('circle.' + kind)].slice(0, 8).map(c => c.cy.baseVal.value);
document.title = JSON.stringify([document.documentElement.scrollWidth <= innerWidth, inside,
  Math.max(...heights('patched')) - Math.min(...heights('patched')) > 50,
  document.querySelectorAll('tr').length, getComputedStyle(document.querySelector('.fail')).color]);
</script>"""


def made() -> str:
    stock = outcome([answer([5, 6, 7, 8]), answer([9, 10, 11, 12], prompt=[4])])
    other = [answer([5, 6, 7, 8], shift=0.02), answer([9, 10, 110, 12], prompt=[4])]
    patched = outcome(other, [row("model.norm"), row("<b>", "x < 1 & y")])
    return page.page([verdict.judged(stock, stock, patched)], ABOUT)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = made()
    assert not re.search(r"https?://|<script|<link|<img|url\(|@import", text)
    assert "&lt;b&gt;" in text
    assert "x &lt; 1 &amp; y" in text


def test_the_page_says_when_and_with_what() -> None:
    text = made()
    assert "2026-11-21T12:00:00+00:00" in text
    assert "norm-plugin verify -- vllm serve &#x27;/models/a b&lt;c&#x27; --enforce-eager" in text
    for name, version in ABOUT["versions"].items():  # type: ignore[attr-defined]
        assert f"<dt>{name}</dt><dd>{version}</dd>" in text
    assert "<dt>vllm</dt><dd>0.32.0</dd>" in text
    assert "vllm 0.32.0, eager, bfloat16 on cpu: stock against native" in text


def test_the_picture_has_titles_and_a_caption() -> None:
    text = made()
    assert ">position in the answer, in tokens</text>" in text
    assert ">largest |Δ logprob|</text>" in text
    assert "<figcaption>Each point is one position of one answer." in text


@pytest.fixture(scope="session")
def browser() -> str:
    """The path of a Chromium."""
    found = subprocess.run([ROOT / "scripts" / "browser"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"no browser can be had here: {found.stderr.strip()}")
    return found.stdout.split()[-1]


@pytest.mark.parametrize("width", [1100, 420])
def test_a_browser_shows_it(width: int, browser: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(made().replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    options = ["--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900"]
    dumped = subprocess.run(
        [browser, "--headless", *options, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", dumped.stdout)
    assert title is not None, dumped.stderr[-2000:]
    fits, labels_inside, points_apart, rows, colour = json.loads(title[1])
    assert labels_inside
    assert points_apart, "0.02 and 0 are not drawn at the same height"
    assert rows == 1 + 2 + 1
    assert colour == "rgb(207, 34, 46)"
    assert fits, f"the page is wider than a window of {width}"


def test_the_picture_has_the_colours_of_both_runs(browser: str, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(made(), encoding="utf-8")
    options = ["--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--window-size=1100,900"]
    subprocess.run([browser, "--headless", *options, f"--screenshot={shot}", file.as_uri()], timeout=120, check=True)
    pixels = image.imread(shot)[..., :3]
    for colour in ((0xD4, 0x62, 0x0B), (0x8C, 0x8C, 0x96)):
        near = abs(pixels - [part / 255 for part in colour]).max(-1) < 0.02
        assert near.sum() > 20, f"nothing is drawn in {colour}"

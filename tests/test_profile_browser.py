"""The page of a profile in a browser: nothing fails, every chart is drawn, nothing sticks out, nothing is fetched."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from headless_browser import Page, browser_page, find_browser
from profile_samples import bare_sample_report, large_sample_report, sample_report

from moe_offload.offload.profiling.page import render

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on this machine"
)

WIDE, PHONE = 1280, 390
# Every part that draws a number, with what it covers of the screen.
DRAWN = """
[...document.querySelectorAll('[data-chart]')].map(chart => {
  const hidden = !chart.checkVisibility();
  const parts = [...chart.querySelectorAll('rect:not(.reach), path, i')];
  const boxes = parts.map(part => part.getBoundingClientRect());
  const box = chart.getBoundingClientRect();
  return {name: chart.dataset.chart, hidden, width: box.width, height: box.height,
          parts: boxes.filter(each => each.width > 0 || each.height > 0).length,
          outside: boxes.filter(each => each.left < box.left - 1 || each.right > box.right + 1).length};
})
"""
COLOURS = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
SMALL_TEXT = """
[...document.querySelectorAll('body *')].filter(each => each.checkVisibility() && each.children.length === 0
  && each.textContent.trim() && each.tagName !== 'SCRIPT' && parseFloat(getComputedStyle(each).fontSize) < 11)
  .map(each => each.outerHTML.slice(0, 200)).filter(text => !text.startsWith('<title'))
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"sample": sample_report, "bare": bare_sample_report, "large": large_sample_report}
    for name, make in made.items():
        (folder / f"{name}.html").write_text(render(make()), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    assert BROWSER is not None
    with browser_page(BROWSER) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.complaints.clear()
    browser.requests.clear()
    return browser


@pytest.mark.parametrize("name", ["sample", "bare", "large"])
@pytest.mark.parametrize(("width", "dark"), [(WIDE, False), (PHONE, True)])
def test_is_drawn_without_complaint(page: Page, pages: dict[str, Path], name: str, width: int, dark: bool):
    page.open(pages[name], width=width, dark=dark)
    charts = page.evaluate(DRAWN)
    shown = [chart for chart in charts if not chart["hidden"]]
    assert {chart["name"] for chart in charts if chart["hidden"]} <= {"heat-hits", "heat-residency"}
    assert len(shown) >= (5 if name == "bare" else 15)
    for chart in shown:
        assert chart["parts"] > 0, chart
        assert chart["outside"] == 0, chart
        assert chart["width"] > (width / 6 if width == WIDE else 0.7 * width), chart
        assert chart["height"] >= 5, chart
    assert page.evaluate(OVERFLOW) == 0
    assert page.evaluate(SMALL_TEXT) == []
    assert page.complaints == []
    assert page.requests == [pages[name].as_uri()]


def test_themes_follow_the_system_and_the_button(page: Page, pages: dict[str, Path]):
    page.open(pages["sample"], width=WIDE)
    light = page.evaluate(COLOURS)
    page.open(pages["sample"], width=WIDE, dark=True)
    dark = page.evaluate(COLOURS)
    assert light != dark
    press = "document.getElementById('theme').click()"
    seen = []
    for _ in range(3):
        page.evaluate(press)
        seen.append(page.evaluate(COLOURS))
    assert seen == [light, dark, dark]


def test_prints_on_white_whatever_the_theme(page: Page, pages: dict[str, Path]):
    page.open(pages["sample"], width=WIDE)
    light = page.evaluate(COLOURS)
    page.open(pages["sample"], width=WIDE, dark=True)
    page.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert page.evaluate(COLOURS) == light
        assert not any(chart["hidden"] for chart in page.evaluate(DRAWN))
    finally:
        page.call("Emulation.setEmulatedMedia", media="")


def test_views_switch_and_residency_moves_through_the_run(page: Page, pages: dict[str, Path]):
    page.open(pages["sample"], width=WIDE)
    visible = (
        "[...document.querySelectorAll('.panel')].filter(each => each.checkVisibility()).map(each => each.classList[1])"
    )
    assert page.evaluate(visible) == ["uses"]
    page.evaluate("document.querySelector('label[for=view-residency]').click()")
    assert page.evaluate(visible) == ["residency"]

    of_layer_2 = """(() => { const rows = {};
      for (const path of document.querySelectorAll('[data-chart=heat-residency] .cells')[2].querySelectorAll('path')) {
        for (const [, top] of path.getAttribute('d').matchAll(/M[\\d.]+ ([\\d.]+)/g))
          rows[top] = path.getAttribute('class');
      } return rows; })()"""
    page.evaluate(
        "(() => { const s = document.getElementById('frame'); s.value = 5; s.dispatchEvent(new Event('input')) })()"
    )
    digits = sample_report().usage.residency.frames[5][2]
    painted = {round(1000 - 1000 / len(digits) * (expert + 1)): f"level-{digit}" for expert, digit in enumerate(digits)}
    assert {round(float(top)): name for top, name in page.evaluate(of_layer_2).items()} == painted
    assert page.complaints == []


def test_pointing_at_a_column_tells_its_numbers(page: Page, pages: dict[str, Path]):
    page.open(pages["sample"], width=WIDE)
    x, y = page.evaluate(
        """(() => { const column = document.querySelectorAll('[data-chart=layer-hits] .column')[3];
        column.scrollIntoView({block: 'center', behavior: 'instant'});
        const box = column.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] })()"""
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    words = page.evaluate("[...document.querySelectorAll('.readout')].map(each => each.textContent).join('')")
    layer = sample_report().layers[3]
    starving = ", starving" if layer.starving else ""
    assert words.startswith(f"layer 3{starving}: hit ratio {100 * layer.hit_ratio:.1f} %")


def test_is_whole_without_javascript(page: Page, pages: dict[str, Path], tmp_path: Path):
    before, script = pages["sample"].read_text(encoding="utf-8").split('<script>\n"use strict"')
    still = tmp_path / "still.html"
    still.write_text(before + script.partition("</script>")[2], encoding="utf-8")
    page.open(still, width=PHONE)
    assert page.evaluate("document.getElementById('theme').hidden && document.getElementById('download').hidden")
    assert all(chart["parts"] > 0 for chart in page.evaluate(DRAWN) if not chart["hidden"])
    assert page.evaluate(OVERFLOW) == 0
    assert page.complaints == []

"""Makes docs/images/profile-*.png: parts of one report's page, as a browser shows them. Needs Chromium and Pillow."""

import argparse
import io
import tempfile
from pathlib import Path

from headless_browser import Page, browser_page, find_browser
from PIL import Image

from moe_offload.offload.profiling.page import render
from moe_offload.offload.profiling.report import ProfileReport

FOLDER = Path(__file__).parent.parent / "docs" / "images"
WIDTH, PHONE_WIDTH, MARGIN = 1080, 390, 10
COLOURS = 96
# Picture by name, and the chart whose figure it shows; "header" is the head of the page.
PICTURES = {
    "glance": "header",
    "time": "time-decode",
    "steps": "time-steps",
    "waiting": "token-wait",
    "outcomes": "token-outcomes",
    "layers": "layer-hits",
    "layer-times": "layer-times",
    "experts": "heat-uses",
    "cache-size": "curves",
    "prediction": "prediction",
    "reads": "prediction-bytes",
    "repetition": "repetition",
}


def main() -> None:
    """Draw the page of the report, and save each picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="JSON of a report: moe-offload profile MODEL --json FILE")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    browser = find_browser()
    if browser is None:
        raise SystemExit("no Chromium here: apt install chromium")
    arguments.folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, browser_page(browser) as page:
        path = Path(scratch) / "report.html"
        path.write_text(render(ProfileReport.load(arguments.report)), encoding="utf-8")
        page.open(path, width=WIDTH)
        for name, chart in PICTURES.items():
            if (selector := selector_of(page, chart)) is not None:
                save(page.screenshot(selector, margin=MARGIN), arguments.folder / f"profile-{name}.png")
        page.open(path, width=PHONE_WIDTH, dark=True)
        save(page.screenshot("header", margin=MARGIN), arguments.folder / "profile-phone.png")


def selector_of(page: Page, chart: str) -> str | None:
    """What finds the figure of a chart; None where the report has no numbers for it."""
    selector = "header" if chart == "header" else f'figure:has([data-chart="{chart}"])'
    return selector if page.evaluate(f"document.querySelector('{selector}') !== null") else None


def save(png: bytes, path: Path) -> None:
    """Few colours are enough for flat ones, and take a quarter of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

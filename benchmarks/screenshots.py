"""Pictures of a report in a real browser, for docs/: `python benchmarks/screenshots.py runs/<scale>/report.html`.

Writes report-wide.png (1,300 px, light) and report-phone.png (390 px, dark) into docs/, in 128 colours.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
# File: width, height and colours of the window.
PICTURES = {"report-wide": (1300, 1500, "light"), "report-phone": (390, 1500, "dark")}


def chromium() -> str | None:
    """The installed browser; playwright brings none of its own."""
    return shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def browser() -> Iterator[Any]:
    """A headless one, driven by playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


def main() -> int:
    from PIL import Image

    if len(sys.argv) != 2 or not (page := Path(sys.argv[1])).is_file():
        print("error: name a report.html: `make` writes runs/<scale>/report.html", file=sys.stderr)
        return 2
    if chromium() is None:
        print("error: no chromium and no google-chrome here", file=sys.stderr)
        return 2
    with browser() as started:
        for name, (width, height, scheme) in PICTURES.items():
            viewport = {"width": width, "height": height}
            window = started.new_page(viewport=viewport, color_scheme=scheme)
            window.goto(page.resolve().as_uri())
            file = DOCS / f"{name}.png"
            window.screenshot(path=file)
            Image.open(file).convert("RGB").quantize(128).save(file, optimize=True)
            print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The report in a real browser: wide and on a phone, light and dark, on paper and by keyboard."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from report_runs import BITS, small_chain, timed
from stage_runs import PlainStage
from test_report_figures import write_side_runs

from launch.report import page
from launch.tools.compare import command

SCREENSHOTS = ROOT / "benchmarks" / "screenshots.py"
WIDTHS, SCHEMES = (1300, 800, 390), ("light", "dark")
TEXT_CONTRAST, CHART_CONTRAST = 4.5, 3.0  # WCAG 2.2: 1.4.3 and 1.4.11

# What a page measures of itself. A colour is drawn on a canvas, to have it as numbers.
MEASURE = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = colour => rgb(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const behind = node => { for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor; if (rgb(colour)[3]) return colour; } return "white"; };
  const shown = [...document.querySelectorAll("body *")].filter(n => n.checkVisibility() && !n.closest("svg"));
  const texts = shown.filter(n => [...n.childNodes].some(c => c.nodeType == 3 && c.data.trim()));
  const lines = [...document.querySelectorAll("svg path, svg use, svg text")].filter(n => !n.closest("defs, clipPath"));
  const colours = lines.flatMap(n => { const s = getComputedStyle(n);
    return (n.tagName == "text" ? [s.fill] : [s.stroke]).filter(c => c != "none" && rgb(c)[3] == 255); });
  const table = document.querySelector("table"), figures = [...document.querySelectorAll("figure svg")];
  return {
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    first_table: [table.scrollWidth - table.clientWidth, Math.ceil(table.getBoundingClientRect().right) - innerWidth],
    figures: figures.map(f => { const b = f.getBoundingClientRect();
      return [b.width, b.height, b.right - innerWidth, f.getAttribute("role"), f.getAttribute("aria-label")]; }),
    text: Math.min(...texts.map(n => contrast(getComputedStyle(n).color, behind(n)))),
    charts: Math.min(...[...new Set(colours)].map(c => contrast(c, behind(document.body)))),
    background: light(getComputedStyle(document.body).backgroundColor),
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    import runpy

    script = runpy.run_path(str(SCREENSHOTS), run_name="imported")
    if script["chromium"]() is None:
        pytest.skip("no chromium and no google-chrome here: the report was seen by no browser")
    with script["browser"]() as started:
        yield started


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlainStage:
    """A chain with a name for everything, and numbers as large as they come."""
    run = small_chain(tmp_path, monkeypatch)
    write_side_runs(run.folder.parent)
    apo = run.inputs["eval"].inputs["apo"]
    assert isinstance(apo, PlainStage)
    names = [f"a score of name {number}" for number in range(20)]
    before_after = {"before": dict.fromkeys(names, 0.1), "after": dict.fromkeys(names, 0.9)}
    line = {"step": 1, "loss": 12.345, "tokens": 11_160_000_000_000, "tokens_per_second": 9_876_543}
    timed(apo, 12_345_678, line, scores=before_after, bits_per_byte={"all": BITS}, sample="x" * 500)
    return run


def opened(browser: Any, file: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """The page in a window, and what the browser's console and network complained of."""
    window = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said = list[str]()
    window.on("console", lambda message: said.append(message.text))
    window.on("pageerror", lambda error: said.append(str(error)))
    window.on("requestfailed", lambda request: said.append(request.url))
    window.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url)
    )  # fmt: skip
    window.goto(file.as_uri())
    return window, said


def check(browser: Any, file: Path, figures: int) -> None:
    for scheme in SCHEMES:
        for width in WIDTHS:
            window, said = opened(browser, file, width, scheme)
            seen, where = window.evaluate(MEASURE), f"{width} px, {scheme}"
            assert said == [], where
            assert seen["overflow"] <= 0, where
            assert len(seen["figures"]) == figures
            for wide, high, right, role, label in seen["figures"]:
                assert wide > 100 and high > 50 and right <= 0 and role == "img" and label, where
            assert seen["text"] >= TEXT_CONTRAST and seen["charts"] >= CHART_CONTRAST, where
            assert (seen["background"] < 0.1) == (scheme == "dark")
            if "report" in file.name:
                assert max(seen["first_table"]) <= 0, where
            window.close()


@pytest.mark.slow
def test_nothing_overflows_and_every_figure_is_there(browser: Any, run: PlainStage) -> None:
    """The first table fits without scrolling, whatever its scores say and however many tokens."""
    file = Path(page.make_report(run)["page"]).resolve()
    check(browser, file, file.read_text("utf-8").count("<figure>"))


@pytest.mark.slow
def test_two_runs_are_compared_on_such_a_page_too(
    browser: Any, run: PlainStage, capsys: pytest.CaptureFixture[str]
) -> None:
    command(str(run.folder.parent), str(run.folder.parent))
    file = Path(capsys.readouterr().out.splitlines()[-1]).resolve()
    check(browser, file, file.read_text("utf-8").count("<figure>"))


@pytest.mark.slow
def test_it_is_read_on_paper_and_by_keyboard(browser: Any, run: PlainStage) -> None:
    file = Path(page.make_report(run)["page"]).resolve()
    window, _ = opened(browser, file, 1300, "dark")
    focused = "() => document.activeElement.textContent.trim()"
    window.keyboard.press("Tab")
    assert window.evaluate(focused) == "Skip to the figures"
    assert window.evaluate("() => document.activeElement.getBoundingClientRect().left >= 0")
    summary = window.locator("details:not([open]) > summary").first.element_handle()
    summary.focus()
    window.keyboard.press("Enter")
    assert summary.evaluate("node => node.parentElement.open")
    summary.evaluate("node => { node.parentElement.open = false }")
    window.emulate_media(media="print", color_scheme="dark")
    assert window.evaluate(MEASURE)["background"] > 0.9, "paper is white"
    assert not window.locator("nav").is_visible()
    tables = window.locator("details table").all()
    assert tables and all(table.bounding_box()["height"] > 0 for table in tables), "all are open"

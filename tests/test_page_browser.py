"""The page in a real browser: nothing overflows, everybody can read it, nobody is asked for anything."""

import itertools
import shutil
from pathlib import Path

import pytest
from report_tools import (
    budgeted,
    make_store,
    make_wide_store,
    material,
    plain,
    result,
    with_pictures,
)

from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.publish import page

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
WIDTHS, SCHEMES = (1400, 400), ("light", "dark")
MOST = 5_000_000  # bytes of a page
WARNED = "the teacher (51.0) is worse than the plain network after logit adjustment (52.0)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[int, Path]:
    """Pages that have everything: of 10 classes, and of 1,000 whose images no PNG makes smaller."""
    out = {}
    for num_classes in (10, 1000):
        store = tmp_path_factory.mktemp(f"store{num_classes}")
        make_store(store) if num_classes == 10 else make_wide_store(store, num_classes, 64)
        split = ShardSplit(store / "shard", "train")
        rows = [plain("plain, whole set", 41.0), plain("plain, logit-adjusted", 52.0)]
        for row in rows:
            row["per_class"] = [row["top1"]] * num_classes
        more = {"plain": rows, "balanced_test": False, "warnings": [WARNED]}
        results = budgeted(result("single", **more), num_classes)
        results |= {"matrix": [1], **with_pictures(store, num_classes, split.counts.tolist())}
        places = {role: store / role for role in ("grouping", "embedding")}
        made = material(
            store, results, **places, **({} if num_classes == 10 else {"teacher": None})
        )
        if num_classes == 1000:
            made.config["ipc"], made.config["data"]["resolution"] = 4, 64
        out[num_classes] = store / "report.html"
        out[num_classes].write_text(page.render(made, split, results))
    return out


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, pages):
    """`visit(classes, width, scheme)`: the page opened, whatever it asks a network for refused and
    counted in `asked`, errors of its own in `errors`."""
    contexts = []

    def opened(num_classes: int, width: int = 1400, scheme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        shown = context.new_page()
        shown.asked, shown.errors = [], []
        shown.on("request", lambda r: shown.asked.append(r.url))
        shown.on("console", lambda m: shown.errors.append(m.text))
        shown.on("pageerror", lambda e: shown.errors.append(str(e)))
        shown.goto(pages[num_classes].as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("num_classes", [10, 1000])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_nothing_is_asked_for(visit, pages, num_classes, width):
    shown = visit(num_classes, width)
    for open_all in (False, True):
        if open_all:
            shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        sizes = shown.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert sizes[0] <= sizes[1] == width
    # Whatever is wider than the page is inside of something that scrolls.
    lost = shown.evaluate(
        """() => [...document.querySelectorAll('main *')].filter(e =>
            e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide, pre')
            && !e.closest('.hidden')).map(e => e.outerHTML.slice(0, 100))"""
    )
    assert lost == []
    own = pages[num_classes].as_uri()
    assert [url for url in shown.asked if not url.startswith((own, "data:"))] == []
    assert shown.errors == []
    drawn = shown.evaluate(
        "[...document.images].every(i => i.complete && i.naturalWidth > 0) && document.images.length"
    )
    assert drawn == 1


def test_a_page_of_a_thousand_classes_is_not_too_large(pages, visit):
    assert 10**6 < pages[1000].stat().st_size < MOST
    shown = visit(1000)
    assert shown.locator("svg[role=img]").count() == 11
    table = shown.locator("details", has_text="Accuracy of each class as numbers")
    assert table.locator("tbody tr").count() == 1000


@pytest.mark.parametrize("num_classes", [10, 1000])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing(visit, num_classes, scheme):
    from axe_playwright_python.sync_playwright import Axe

    shown = visit(num_classes, 1400 if scheme == "light" else 400, scheme)
    if num_classes == 10:
        shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(shown).response
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found["violations"]] == []
    assert found["testEngine"]["name"] == "axe-core" and len(found["passes"]) > 15


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_ink_of_pictures_is_seen_on_both_papers(visit, scheme):
    """axe does not look at the colours inside of an SVG."""
    shown = visit(10, 1400, scheme)
    style = "getComputedStyle(document.documentElement).getPropertyValue('--{}').trim()"

    def colour(name: str) -> str:
        return shown.evaluate(style.format(name))

    paper = luminance(colour("paper"))
    assert (paper > 0.9) == (scheme == "light")
    least = {"ink": 7.0, "muted": 4.5, "link": 4.5, "edge": 3.0}
    least |= {f"s{k}": 3.0 for k in range(8)}
    for name, wanted in least.items():
        bright, dark = sorted([paper, luminance(colour(name))], reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= wanted, (name, colour(name))
    bright, dark = sorted([luminance(colour("alert")), luminance(colour("ink"))], reverse=True)
    assert (bright + 0.05) / (dark + 0.05) >= 7.0
    text = shown.locator("#main svg text").first
    red, green, blue = text.evaluate("e => getComputedStyle(e).fill.match(/\\d+/g).map(Number)")
    assert f"#{red:02x}{green:02x}{blue:02x}" == colour("ink")


def test_the_keyboard_reaches_everything(visit):
    shown = visit(10, 400)
    names, wanted = (
        [],
        shown.evaluate(
            "[...document.querySelectorAll('a, summary, [tabindex=\"0\"]')].filter(e => e.checkVisibility()).length"
        ),
    )
    for _ in range(wanted):
        shown.keyboard.press("Tab")
        names.append(
            shown.evaluate(
                "(e => e.getAttribute('aria-label') || e.textContent.trim())(document.activeElement)"
            )
        )
    assert names[0] == "Skip to the results"
    assert "All settings" in names and "The tree of classes" in names and len(names) > 25
    assert shown.evaluate("document.activeElement !== document.body")
    # What stands in focus scrolls with the arrows; the skip link leads past the sections' links.
    region = shown.get_by_role("region", name="Accuracy of each class, from head to tail")
    region.focus()
    for _ in range(3):
        shown.keyboard.press("ArrowRight")
    shown.wait_for_function("e => e.scrollLeft > 0", arg=region.element_handle())
    summary = shown.get_by_text("All settings", exact=True)
    summary.focus()
    shown.keyboard.press("Enter")
    assert summary.evaluate("e => e.parentElement.open")


def test_a_screen_reader_hears_the_message_first_and_every_picture(visit):
    shown = visit(10)
    tree = shown.locator("body").aria_snapshot()
    assert tree.index("Trained on") < tree.index(WARNED) < tree.index("img") < tree.index("table")
    assert WARNED in shown.get_by_role("note", name="Warnings").text_content()
    heading = [
        int(h[1])
        for h in shown.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName)")
    ]
    assert heading[0] == 1 and heading.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(heading))
    for picture in shown.get_by_role("img").all():
        assert len(picture.evaluate("e => e.ariaLabel || e.alt || e.textContent")) > 20
    message = shown.get_by_role("img", name="The distilled set against random real images").first
    assert "With single labels: distilled" in message.text_content()
    table = shown.get_by_role("table", name="The set beside random real images").first
    assert table.get_by_role("columnheader").count() == 12
    assert table.get_by_role("rowheader", name="distilled").count() == 1

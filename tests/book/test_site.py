"""The built site in a browser: run `make book` first. Without _build/html these tests are not collected,
but in CI a missing site or a missing browser fails."""

import html
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe

from release import CHROMIUM, SITE, pdf

ROOT = Path(__file__).parents[2]
PAGES = [str(path.relative_to(SITE)) for path in sorted(SITE.rglob("*.html")) if "_static" not in path.parts]
PAGES = [page for page in PAGES if page != "index.html"]  # it only leads on to the first page
CHAPTERS = [page for page in PAGES if (ROOT / "notebooks" / Path(page).with_suffix(".ipynb").name).exists()]
WIDGETS = [page for page in PAGES if "jupyter.widget-view" in (SITE / page).read_text(encoding="utf-8")]
VALUES = json.loads((ROOT / "book" / "values.json").read_text(encoding="utf-8"))
A4 = 680  # pixels between the margins of a printed page, 210 - 2 * 15 mm
# What is wider than its place, or than a place around it that scrolls or cuts off, as text.
TOO_WIDE = """selector => [...document.querySelectorAll(selector)].filter(part => {
    for (let e = part; e.tagName !== "ARTICLE"; e = e.parentElement) {
        const style = getComputedStyle(e), holds = e === part || style.overflowX !== "visible";
        if (holds && style.display !== "inline" && e.scrollWidth > e.clientWidth + 1) return true;
    }
    return part.getBoundingClientRect().right > document.querySelector("article").getBoundingClientRect().right + 1;
}).map(part => `${part.tagName}: ${(part.innerText || part.alt || "").slice(0, 80)}`)"""
UNFOLD = """() => {
    document.querySelectorAll("details").forEach(part => { part.open = true });
    document.querySelectorAll(".toggle-hidden").forEach(part => part.classList.remove("toggle-hidden"));
    dispatchEvent(new Event("resize"));
}"""
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]

__test__ = bool(PAGES and CHROMIUM) or "CI" in os.environ


@pytest.fixture(scope="module", params=PAGES)
def page(browser, request):
    """Each page of the site once, on a wide screen and in the light theme."""
    page = open_page(browser, request.param)
    yield page
    page.close()


def open_page(browser, name, width=1280, theme="light"):
    """Open a page and wait until its formulas and widgets are drawn; `page.problems` lists what went wrong."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.add_init_script(f"localStorage.mode = localStorage.theme = {theme!r}")
    page.problems = []
    page.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("requestfailed", lambda request: page.problems.append(f"failed: {request.url}"))
    page.on("request", lambda request: page.problems.extend(abroad(request.url)))
    page.goto((SITE / name).as_uri())
    page.evaluate("window.MathJax?.startup?.promise")
    if name in WIDGETS:
        page.wait_for_selector(".noUi-handle[aria-label]")
    return page


def abroad(url):
    """The address, if it is not one of this site's own files."""
    return [] if url.startswith((SITE.as_uri(), "data:", "blob:")) else [f"not of this site: {url}"]


def test_the_site_and_a_browser_are_there():
    assert "book/intro.html" in PAGES, "run `make book`"
    assert CHROMIUM, "install chromium"


def times_slower():
    """How much slower the machine of the build was than the one that the limits of seconds are for; at least 1."""
    text = (SITE.parent / "seconds.txt").read_text(encoding="utf-8")
    return float(re.search(r"^ *([\d.]+) times the seconds", text, re.MULTILINE)[1])


def test_every_chapter_took_its_seconds():
    text = (SITE.parent / "seconds.txt").read_text(encoding="utf-8")
    seconds = {name: float(number) for number, name in re.findall(r"^ *([\d.]+) s  (.*)$", text, re.MULTILINE)}
    assert seconds.keys() == {str(Path(page).with_suffix("")) for page in CHAPTERS} | {"all chapters"}
    slower = times_slower()
    assert max(value for name, value in seconds.items() if name != "all chapters") <= 60 * slower
    assert seconds["all chapters"] <= 360 * slower
    table = (SITE / "book" / "timing.html").read_text(encoding="utf-8")
    assert all(f">book/{Path(page).stem}<" in table for page in CHAPTERS)


def test_each_chapter_says_its_minutes():
    for page in CHAPTERS:
        said = re.search(
            r'<p class="minutes">About (\d+) minutes .* took (\d+) s', (SITE / page).read_text(encoding="utf-8")
        )
        assert 5 <= int(said[1]) <= 25
        assert int(said[2]) <= 60 * times_slower()


def test_sitemap_and_previews_of_links():
    site = re.search(r"html_baseurl: (\S+)", (ROOT / "_config.yml").read_text())[1]
    listed = re.findall(r"<loc>(.*?)</loc>", (SITE / "sitemap.xml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(site + page for page in PAGES if page.startswith("book/"))
    for page in (page for page in PAGES if page.startswith("book/")):
        text = (SITE / page).read_text(encoding="utf-8")
        image = re.search(r'<meta property="og:image" content="(.*?)"', text)[1]
        assert image.startswith(site)
        assert (SITE / image.removeprefix(site)).exists()
        assert re.search(r'<meta property="og:title" content=".{4,}"', text)
        assert re.search(r'<link rel="icon" href="(.*?)"|rel="shortcut icon" href="(.*?)"', text)


def test_printed_pages_have_text_alone(browser):
    page = open_page(browser, CHAPTERS[0])
    page.emulate_media(media="print")
    for part in (".bd-sidebar-primary", ".bd-header-article", ".prev-next-footer"):
        assert page.locator(part).first.is_hidden()
    assert "Data, a model" in page.locator("h1:visible").first.inner_text()
    page.close()


def test_paper_shows_what_a_screen_folds(browser):
    page = open_page(browser, CHAPTERS[0])
    folded = page.locator("article details:not([open]), article .toggle-hidden")
    assert folded.count()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not folded.count()
    assert page.locator("article details pre").first.is_visible()
    moving = 'parts => parts.filter(part => getComputedStyle(part).animationName !== "none").length'
    assert page.locator("article details *").evaluate_all(moving) == 0  # paper would have the first frame
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("article details:not([open])").count()
    page.close()


@pytest.mark.parametrize(("name", "sheets"), [("handout", [1]), ("slides", [13]), ("04_paths", range(5, 20))])
def test_pdf(browser, name, sheets, tmp_path):
    pdf(browser, SITE / "book" / f"{name}.html", tmp_path / "page.pdf")
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "page.pdf").read_bytes())) in sheets


def test_arrow_keys_turn_the_slides(browser):
    page = open_page(browser, "book/slides.html")
    tops = "[...document.querySelectorAll('#slides > section')].map(slide => slide.getBoundingClientRect().top)"
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        seen.append(sum(top < 100 for top in page.evaluate(tops)))
    assert seen == [1, 2, 1]
    page.close()


def test_the_site_opens_on_the_introduction(browser):
    page = browser.new_page()
    page.goto((SITE / "index.html").as_uri())
    page.wait_for_url("**/book/intro.html")
    page.close()


def test_search_works_without_a_server(browser):
    page = browser.new_page()
    page.goto((SITE / "search.html").as_uri() + "?q=amplification")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")
    assert any("02_relevance_by_hand.html" in link for link in found)
    page.close()


def test_quiet_and_at_home(page):
    assert page.problems == []


def test_formulas_are_drawn(page):
    assert page.locator(".math:has(mjx-container)").count() == page.locator(".math").count()
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0


def test_every_picture_is_described(page):
    for alt in page.eval_on_selector_all("article img", "images => images.map(image => image.alt)"):
        assert len(alt.split()) > 2, f"too little: {alt!r}"
        assert not re.search(r"\.(png|svg|jpe?g)$", alt), f"a file's name: {alt!r}"


def test_links_lead_somewhere(page):
    for link in page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)"):
        if link.startswith("file:"):
            parts = urlsplit(link)
            target = Path(unquote(parts.path))
            assert target.exists(), link
            if parts.fragment:
                ids = re.findall(r'\bid="([^"]+)"', target.read_text(encoding="utf-8"))
                assert unquote(parts.fragment) in ids, link


def test_nothing_sticks_out(page):
    wide, high = page.viewport_size["width"], page.viewport_size["height"]
    for width in (wide, 360):
        page.set_viewport_size({"width": width, "height": high})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": wide, "height": high})


def test_tables_are_narrow(page):
    rows = "rows => rows.map(row => [...row.cells].reduce((sum, cell) => sum + cell.colSpan, 0))"
    assert max(page.eval_on_selector_all("article table tr", rows), default=0) <= 6


def complaints(page):
    """What axe has against a page as it is shown now."""
    found = Axe().run(page, options={"runOnly": WCAG, "resultTypes": ["violations"]})
    return found.generate_report() if found.response["violations"] else ""


@contextmanager
def in_the_dark(page, width):
    """The same page in the dark theme and another width, then back."""
    before, high = page.viewport_size, page.viewport_size["height"]
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.set_viewport_size({"width": width, "height": high})
    yield page
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    page.set_viewport_size(before)


def test_accessible_in_the_light_and_on_a_telephone_in_the_dark(page):
    root = page.locator("html")
    assert (root.get_attribute("lang"), root.get_attribute("data-theme")) == ("en", "light")
    assert complaints(page) == ""
    with in_the_dark(page, 360):
        assert complaints(page) == ""


def test_what_stands_beside_a_page_is_accessible_in_the_dark(browser):
    page = open_page(browser, "book/intro.html", theme="dark")
    assert page.get_attribute("html", "data-theme") == "dark"
    assert complaints(page) == ""
    page.close()


if WIDGETS:

    @pytest.mark.parametrize("page_name", WIDGETS)
    def test_the_keyboard_moves_the_slider(browser, page_name):
        page = open_page(browser, page_name)
        moved = 0
        for slider in page.locator(".widget-vbox:has(> .zsu-frames)").all():
            if not slider.is_visible():  # inside a frame that is not shown
                continue
            moved += 1
            handle = slider.locator(":scope > .widget-slider .noUi-handle")
            picture = slider.locator(".zsu-frames img:visible")
            assert handle.get_attribute("role") == "slider"
            assert handle.get_attribute("aria-label")
            readout = slider.locator(":scope > .widget-slider .widget-readout")
            before = [picture.get_attribute("alt"), picture.get_attribute("src"), readout.inner_text()]
            handle.press("ArrowRight")
            after = [picture.get_attribute("alt"), picture.get_attribute("src"), readout.inner_text()]
            assert all(old != new for old, new in zip(before, after, strict=True)), (before[0], after[0])
            assert handle.get_attribute("aria-valuetext") == after[2]
        assert moved
        page.close()


if CHAPTERS:

    @pytest.mark.parametrize("page_name", CHAPTERS)
    def test_notebook_and_page_give_the_same_numbers(page_name):
        page = (SITE / page_name).read_text(encoding="utf-8")
        notebook = json.loads((ROOT / "notebooks" / Path(page_name).with_suffix(".ipynb").name).read_text())
        text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        assert re.findall(r"\\tag\{([\d.]+)\}", text) == re.findall(r'class="eqno">\(([\d.]+)\)', page)
        assert re.findall(r"^\*(Fig\. [\d.]+):\*", text, re.M) == re.findall(r'"caption-number">(Fig\. [\d.]+) <', page)
        assert re.findall(r"\*\*(Exercise [\d.]+)", text) == re.findall(
            r'class="admonition-title">.*?(Exercise [\d.]+)', re.sub(r"<a\b.*?</a>", "", page, flags=re.DOTALL)
        )

    @pytest.mark.parametrize("page_name", CHAPTERS)
    def test_the_rocket_opens_the_notebooks_and_the_menu_has_their_files(page_name):
        repository = re.search(r"url: https://github.com/(\S+)", (ROOT / "_config.yml").read_text())[1]
        page, file = (SITE / page_name).read_text(encoding="utf-8"), Path(page_name).with_suffix(".ipynb").name
        colab = f"https://colab.research.google.com/github/{repository}/blob/main"
        for text, folder in (("Colab", "notebooks"), ("Exercises in Colab", "notebooks/exercises")):
            button = re.search(rf'<a href="{re.escape(f"{colab}/{folder}/{file}")}".*?</a>', page, re.DOTALL)[0]
            assert re.search(rf"^\s*{text}\s*$|>{text}<", button, re.MULTILINE)
        menu = re.search(r'class="dropdown dropdown-download-buttons">.*?</ul>', page, re.DOTALL)[0]
        links = re.findall(r'href="(.*?)"', menu)
        assert links == [f"../notebooks/{file}", f"../notebooks/exercises/{file}"]
        for link in links:
            name = link.removeprefix("../")
            assert (SITE / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")

    @pytest.mark.parametrize("page_name", CHAPTERS)
    def test_the_page_shows_the_values_that_the_notebook_says(page_name):
        page = (SITE / page_name).read_text(encoding="utf-8")
        shown = [html.unescape(text) for text in re.findall(r'<span class="pasted-text">(.*?)</span>', page)]
        source = (ROOT / page_name).with_suffix(".md").read_text(encoding="utf-8")
        names = re.findall(r"\{glue:text\}`([^`]*)`", source)
        assert shown == [VALUES[Path(page_name).stem][name] for name in names]

    @pytest.fixture(scope="module", params=CHAPTERS)
    def resized(browser, request):
        """Each chapter once, to be shown at other widths."""
        page = open_page(browser, request.param)
        yield page
        page.close()

    def show(page, width, media="screen"):
        """At this width and on this medium, with all that folds open."""
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(media=media)
        page.evaluate(UNFOLD)

    @pytest.mark.parametrize(("width", "media"), [(1280, "screen"), (A4, "print")])
    def test_nothing_is_cut_off(resized, width, media):
        """No code, output, table, formula or figure of a chapter is wider than its column, on a screen or on paper."""
        show(resized, width, media)
        assert resized.evaluate(TOO_WIDE, "article :is(pre, table, figure img, mjx-container[display])") == []

    def test_what_scrolls_on_a_telephone_shows_that_it_does(resized):
        page = resized
        show(page, 360)
        assert page.evaluate(TOO_WIDE, "article mjx-container[display]") == []  # formulas break instead
        scrolled = """() => [...document.querySelectorAll("article *")].filter(e =>
            ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth + 1)"""
        shadow = """(e, side) => { const style = getComputedStyle(e.parentElement, side);
            return style.content !== "none" && style.opacity === "1" && parseFloat(style.width) > 10 &&
                style.backgroundImage.startsWith("linear-gradient") }"""
        assert page.evaluate(f"({scrolled})().length")
        bare = f"({scrolled})().filter(e => !({shadow})(e, '::after')).map(e => e.outerHTML.slice(0, 80))"
        assert page.evaluate(bare) == []
        marked = page.locator(".scrolls.more-right")
        marked.first.locator(":scope > *").evaluate("e => { e.scrollLeft = e.scrollWidth }")
        page.wait_for_selector(".scrolls.more-left:not(.more-right)")
        end = page.locator(".scrolls.more-left:not(.more-right) > *").first
        assert end.evaluate(f"e => ({shadow})(e, '::before')")
        assert not end.evaluate(f"e => ({shadow})(e, '::after')")


def test_nothing_stands_beside_the_slides(browser):
    page = open_page(browser, "book/slides.html")
    assert not page.locator(".bd-sidebar-primary, .bd-sidebar-secondary").locator("visible=true").count()
    page.close()

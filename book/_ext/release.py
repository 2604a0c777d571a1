"""After `make book`: the site as a zip for reading offline, and each chapter as a PDF: python book/_ext/release.py

Needs Chromium and the packages of the tests. Everything goes to _build/release.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SITE, RELEASE = ROOT / "_build" / "html", ROOT / "_build" / "release"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MARGIN = dict.fromkeys(("top", "bottom", "left", "right"), "15mm")


def pdf(browser: Browser, page: Path, out: Path) -> None:
    """Print a page as it looks in the light theme, formulas and first frames of widgets included."""
    tab = browser.new_page()
    tab.add_init_script("localStorage.mode = localStorage.theme = 'light'")
    tab.goto(page.as_uri())
    tab.evaluate("window.MathJax?.startup?.promise")
    if tab.locator("script[type='application/vnd.jupyter.widget-view+json']").count():
        tab.wait_for_selector(".noUi-handle[aria-label]")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")  # unfolds; Chromium does not do it by itself
    tab.pdf(path=out, format="A4", print_background=True, margin=MARGIN)
    tab.close()


def main() -> int:
    if not (SITE / "index.html").exists() or CHROMIUM is None:
        print("run `make book` and install chromium first", file=sys.stderr)
        return 1
    shutil.rmtree(RELEASE, ignore_errors=True)
    RELEASE.mkdir()
    shutil.copytree(SITE, RELEASE / "zsu-book")
    shutil.make_archive(str(RELEASE / "zsu-book"), "zip", RELEASE, "zsu-book")  # with one folder at its top
    shutil.rmtree(RELEASE / "zsu-book")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for page in sorted((SITE / "book").glob("*.html")):
            pdf(browser, page, RELEASE / f"{page.stem}.pdf")
        browser.close()
    print(f"wrote {len(list(RELEASE.iterdir()))} files to {RELEASE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

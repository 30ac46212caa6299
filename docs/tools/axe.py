"""Looks for accessibility errors on pages of the built site, in Chromium: light, dark, and as wide as a phone.

    .venv/bin/python docs/tools/axe.py AXE.JS [--screenshots FOLDER]

AXE.JS is `axe.min.js` of the npm package axe-core (`make docs-check` gets it).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

SITE = Path(__file__).parents[2] / "site"
PAGES = ("index.html", "tutorials/features.html", "options.html", "maths.html", "python.html")
VIEWS = {"light": ("light", 1280), "dark": ("dark", 1280), "phone": ("light", 390), "phone-dark": ("dark", 390)}
"""Color scheme and width in pixels."""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def errors(browser: Browser, address: str, axe: Path, view: str, picture: Path | None) -> list[str]:
    """Return what axe finds on one page, a line for each element."""
    scheme, width = VIEWS[view]
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900}, reduced_motion="reduce")
    page.goto(address, wait_until="load")
    page.add_script_tag(path=axe)
    found = page.evaluate("axe.run().then(result => result.violations)")
    if picture is not None:
        page.screenshot(path=picture)
    page.close()
    return [f"{each['id']}: {node['html'][:160]}: {node['failureSummary']}" for each in found for node in each["nodes"]]


def main() -> None:
    """Check all pages in all views; the exit code is 1 if there is an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("axe", type=Path)
    parser.add_argument("--screenshots", type=Path, help="a folder for a picture of each view")
    given = parser.parse_args()
    if given.screenshots:
        given.screenshots.mkdir(parents=True, exist_ok=True)
    count = 0
    with served(SITE) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in PAGES:
            for view in VIEWS:
                picture = given.screenshots and given.screenshots / f"{Path(name).stem}-{view}.png"
                found = errors(browser, address + name, given.axe, view, picture)
                count += len(found)
                sys.stdout.writelines(f"{name}, {view}: {line}\n" for line in found)
        browser.close()
    sys.stdout.write(f"{len(PAGES)} pages in {len(VIEWS)} views: {count} errors\n")
    sys.exit(count > 0)


if __name__ == "__main__":
    main()

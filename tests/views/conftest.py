"""A report of a short run, and a real Chromium to open it in."""

import json
import shutil
from pathlib import Path

import pytest

from saekit.runs.layout import EVAL_FILE
from tests.analysis.conftest import demo_run  # noqa: F401
from tests.cli.conftest import saekit  # noqa: F401

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def made(demo_run, forked):  # noqa: F811
    """The page, and what the command said."""
    file = demo_run.parent / "report.html"
    command = ["report", demo_run, "-o", file, "--max-tokens", 3000]
    done = forked.complete("-m", "saekit", *command, cwd=demo_run.parent)
    assert done.returncode == 0, done.stderr
    return file, done.stdout


@pytest.fixture(scope="session")
def evaluation(made, demo_run):  # noqa: F811
    return json.loads((demo_run / "latest" / EVAL_FILE).read_text("utf-8"))


@pytest.fixture(scope="session")
def chromium():
    """A running browser; a test that needs one skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, CHROMIUMS)), None)
        own = driver.chromium.executable_path
        if found is None and not Path(own).exists():
            pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, made):
    """Opens the report; afterwards there must have been no message on the console, no error and no request."""
    contexts, trouble = [], []

    def opened(address="", **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: trouble.append(request.url) if request.url.startswith("http") else None)
        page.goto(made[0].as_uri() + address)
        page.wait_for_selector("#feature[aria-busy=false]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []

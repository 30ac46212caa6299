"""A report of a short run, and a real Chromium to open it in."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from saekit.runs.layout import EVAL_FILE, REPORT_FOLDER
from saekit.views.page.serve import ReportServer
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
def folder(made, demo_run, forked):  # noqa: F811
    """The same report for `--serve`."""
    command = ["report", demo_run, "--prepare", "--max-tokens", 3000]
    done = forked.complete("-m", "saekit", *command, cwd=demo_run.parent)
    assert done.returncode == 0, done.stderr
    return (demo_run / "latest").resolve() / REPORT_FOLDER


@pytest.fixture(scope="session")
def server(folder):
    """A server of it, in this process."""
    with ReportServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


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
    yield from _opening(chromium, made[0].as_uri(), "file:")


@pytest.fixture
def open_served(chromium, server):
    """Opens the served report; afterwards there must have been no request to anybody else."""
    yield from _opening(chromium, server.url, server.url)


@pytest.fixture(params=["file", "served"])
def open_either(request):
    """One after the other."""
    return request.getfixturevalue({"file": "open_page", "served": "open_served"}[request.param])


def _opening(chromium, url, allowed):
    contexts, trouble, own = [], [], (allowed, "data:", "blob:")

    def opened(address="", **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: request.url.startswith(own) or trouble.append(request.url))
        page.goto(url + address)
        page.wait_for_selector("#feature[aria-busy=false]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []

"""In a notebook: one output, which is updated. The real thing is tried where Jupyter is installed."""

import subprocess
import sys
import types
from dataclasses import replace

import pytest
from rich.console import Console

from saekit.report.notebook import LINES, NotebookReporter
from saekit.report.terminal import terminal_reporter


class Output:
    """IPython's display and its handle: keeps what is shown."""

    def __init__(self):
        self.made, self.shown = 0, []

    def display(self, data, *, raw, display_id):
        assert raw is display_id is True
        self.made += 1
        self.shown.append(data)
        return self

    def update(self, data, *, raw):
        assert raw is True
        self.shown.append(data)

    @property
    def text(self):
        return self.shown[-1]["text/plain"]


@pytest.fixture
def output(monkeypatch):
    found = Output()
    for name in ("IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["IPython.display"].display = found.display
    return found


def test_all_of_a_run_is_one_output(output, make_info, make_stats, make_evaluation, clock, tmp_path):
    reporter = NotebookReporter(clock)
    reporter.status("Calibrating [on] the first batch")
    reporter.start(make_info(32))
    for step in range(1, 17):
        clock.now += 1 / 16
        reporter.step(make_stats(step, 32))
    assert len(output.shown) == 2 + 4  # of a second
    reporter.status("Warning: step 9 was skipped")
    reporter.evaluated(make_evaluation(16, 32))
    clock.now += 1
    reporter.saved(tmp_path / "step_00000016", 16)
    reporter.finish()
    reporter.finish()
    assert output.made == 1
    assert len(output.shown) == 2 + 4 + 4
    lines = output.text.splitlines()
    assert lines[:2] == ["Calibrating [on] the first batch", "Warning: step 9 was skipped"]
    assert sum(line.startswith("layers.") for line in lines) == 32
    for part in ("16/1,000 steps", "stopped after", "saved step 16", "evaluated at step 16"):
        assert part in output.text
    page = output.shown[-1]["text/html"]
    assert page.startswith("<pre")
    assert "Calibrating [on] the first batch" in page
    assert "\x1b" not in page + output.text


def test_names_are_no_html(output, make_info):
    reporter = NotebookReporter()
    reporter.start(replace(make_info(), model="<b>model</b>"))
    assert "<b>" not in output.shown[-1]["text/html"]
    assert "<b>model</b>" in output.text


def test_old_messages_make_room(output):
    reporter = NotebookReporter()
    for number in range(100):
        reporter.status(f"message {number}")
    assert output.text.split("\n")[0] == f"message {100 - LINES}"
    assert output.made == 1


def test_without_a_run_nothing_is_left(output, make_stats):
    reporter = NotebookReporter()
    reporter.step(make_stats(1))
    reporter.finish()
    assert output.made == 0


@pytest.mark.parametrize("ci", ["", "true"])
def test_it_is_chosen_in_a_notebook(output, monkeypatch, ci):
    monkeypatch.setenv("CI", ci)
    assert isinstance(terminal_reporter(Console(stderr=True, force_jupyter=True)), NotebookReporter)


NOTEBOOK = """
import sys, types
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
for name in ("IPython", "ipykernel", "ipykernel.zmqshell"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["IPython"].get_ipython = lambda: shell
sys.modules["ipywidgets"] = None
"""


@pytest.mark.parametrize(("before", "warned"), [("import saekit; saekit.UserError", False), ("pass", True)])
def test_tqdm_does_not_ask_for_widgets(before, warned):
    program = f"{NOTEBOOK}\n{before}\nimport tqdm.auto\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ("IProgress not found" in done.stderr) == warned


@pytest.mark.slow
def test_in_a_real_notebook(model_dir, text_file, tmp_path):
    """One updating output, and nothing on stderr."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    options = "ctx_len=32, max_tokens=2048, layers=[1], num_latents=64, k=4, batch_size=4"
    code = f"import saekit\nlast = saekit.train({str(model_dir)!r}, {str(text_file)!r}, save_dir='runs', {options})"
    cells = [nbformat.v4.new_code_cell(code)]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = book.cells[0].outputs
    assert output.output_type == "display_data"
    assert "done in" in output.data["text/plain"]

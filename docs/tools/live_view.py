"""Draws docs/live.svg: the live view of a real run, at 70% of its steps.

    .venv/bin/python docs/tools/live_view.py

It trains what `saekit demo` trains, and leaves out the rest of the demo.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme

from saekit.config import RunConfig
from saekit.demo import standard_library
from saekit.report.live_view import LiveState, run_view
from saekit.report.pace import Pace
from saekit.report.stats import EvalStats, RunInfo, StepStats
from saekit.training.launch import train_from_config

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT = 92, 26
AT = 0.7
"""Of the run's steps."""
THEME = TerminalTheme(
    (24, 26, 32),
    (214, 217, 224),
    [(24, 26, 32), (240, 113, 120), (152, 195, 121), (229, 192, 123),
     (97, 175, 239), (198, 120, 221), (86, 182, 194), (214, 217, 224)],
)  # fmt: skip


class Picture:
    """A reporter that keeps the live view's state, draws it once, and then ends the run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def status(self, message: str) -> None:
        """Say nothing."""

    def start(self, info: RunInfo) -> None:
        """Begin as the live view does."""
        self.state = LiveState(info, Pace(info, time.monotonic))

    def step(self, stats: StepStats) -> None:
        """Take the numbers of a report."""
        self.state.pace.update(stats)
        self.state = self.state.after(stats)
        if stats.step >= AT * self.state.info.total_steps:
            draw(self.state, self.file)
            raise SystemExit(0)

    def evaluated(self, stats: EvalStats) -> None:
        """The demo does not evaluate while it trains."""

    def saved(self, path: Path, step: int) -> None:
        """Nothing is saved so early."""

    def finish(self) -> None:
        """Leave nothing."""


def draw(state: LiveState, file: Path) -> None:
    """Write the view as an SVG that fetches no fonts."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(
            record=True, width=WIDTH, height=HEIGHT, file=nowhere, force_terminal=True, legacy_windows=False
        )
        console.print(run_view(state, WIDTH, HEIGHT))
        form = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
        form = form.replace("Fira Code", "ui-monospace").replace("font-family: arial", "font-family: sans-serif")
        svg = console.export_svg(title="saekit train", theme=THEME, code_format=form, unique_id="live")
    file.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


def main() -> None:
    """Train as the demo does, from a folder in which paths are short."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("saekit").symlink_to(ROOT / "saekit")
        Path("saekit-demo").mkdir()
        text = Path("saekit-demo/stdlib.jsonl")
        text.write_text("".join(json.dumps({"text": each}) + "\n" for each in standard_library()), encoding="utf-8")
        options = {"model": "saekit/demo/model", "dataset": str(text), "ctx_len": 256, "max_tokens": 350_000}
        where = {"save_dir": "saekit-demo", "run_name": "run-1", "log_every": 2}
        train_from_config(RunConfig.from_flat({**options, **where}), Picture(ROOT / "docs" / "live.svg"))


if __name__ == "__main__":
    main()

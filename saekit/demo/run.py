"""`saekit demo`: from text to SAEs to what is in them, and how good they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.text import Text

from saekit.analysis.eval_checkpoint import EvalOptions, joined
from saekit.analysis.inspect import inspect_path
from saekit.cli.output import messages, results, resumable
from saekit.cli.progress import progress
from saekit.config import RunConfig
from saekit.demo import MODEL_DIR
from saekit.demo.text import standard_library
from saekit.training.launch import train_from_config
from saekit.views.inspection import render_inspection
from saekit.views.page.build import build_report

EVALUATED_SHARE = 7
"""For so many tokens trained on, one is evaluated on."""


def run_demo(save_dir: Path, max_tokens: int) -> None:
    """Write the standard library's text to a file, train on it, evaluate and show the result, and say what to try next.

    Args:
        save_dir: Holds the text and a numbered run folder, so that nothing of an earlier demo is lost.
        max_tokens: Tokens to train on.
    """
    save_dir.mkdir(parents=True, exist_ok=True)
    text = save_dir / "stdlib.jsonl"
    lines = (json.dumps({"text": document}) + "\n" for document in standard_library())
    text.write_text("".join(lines), encoding="utf-8")

    taken = (path.name.removeprefix("run-") for path in save_dir.glob("run-*"))
    number = 1 + max((int(name) for name in taken if name.isdigit()), default=0)
    cfg = RunConfig.from_flat(
        {
            "model": str(MODEL_DIR),
            "dataset": str(text),
            "ctx_len": 256,
            "max_tokens": max_tokens,
            "save_dir": save_dir,
            "run_name": f"run-{number}",
        }
    )
    with resumable():
        train_from_config(cfg)
    run_dir = save_dir / f"run-{number}"
    page = run_dir / "report.html"
    with joined(quiet=not sys.stderr.isatty()) as placement, progress() as bar:
        options = EvalOptions(max_tokens=max(1, max_tokens // EVALUATED_SHARE))
        build_report(run_dir, options, page, placement, status=bar.status, progress=bar.update)
    render_inspection(inspect_path(run_dir), results())
    messages().print(
        Text(
            f"\nOpen {page} in a browser: what each latent fires on.\n"
            "\nWhat to try next:\n"
            f"  saekit inspect {run_dir} --layer 3          one layer in detail\n"
            f"  saekit eval {run_dir} --max-tokens 200000   the same figures on more text that it did not read\n"
            f"  saekit train {MODEL_DIR} {text} --k 16      fewer active latents\n"
            "  saekit train MODEL DATASET                  your own model and text\n"
            "  saekit train --help                         all options"
        ),
        soft_wrap=True,
    )

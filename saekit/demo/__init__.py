"""The demo's inputs: a small language model, trained by `examples/train_demo_lm.py`, and text that is at hand.

Internal: may change in any release; the API is what `saekit` names.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The language model and its tokenizer, loadable by transformers."""


LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}
)
"""Folders without prose or ordinary code: other packages, tests, tables."""


def standard_library() -> Iterator[str]:
    """Yield the text of every module, one by one, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(file.relative_to(root).parts):
            text = file.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield text

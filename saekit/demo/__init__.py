"""What `saekit demo` runs: a small language model, trained by `examples/train_demo_lm.py`, and text that is at hand.

Internal: may change in any release; the API is what `saekit` names.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The language model and its tokenizer, loadable by transformers."""

"""What tests of plug-ins have in common."""

import sys
from contextlib import contextmanager
from pathlib import Path

from saekit.registry import FORMATS, PLACEMENTS, SELECTIONS, SOURCES, load_plugin

ABS_TOPK = Path(__file__).parents[1] / "examples" / "abs_topk.py"


def forget_plugins():
    """As if no plug-in had been loaded in this process."""
    for name in [name for name in sys.modules if name.startswith("saekit_plugin_")]:
        del sys.modules[name]
    for registry in (SELECTIONS, SOURCES, PLACEMENTS, FORMATS):
        registry._registered.clear()
        registry._origin.clear()


@contextmanager
def loaded(file):
    """A plug-in, for as long as it is needed."""
    try:
        load_plugin(file)
        yield
    finally:
        forget_plugins()

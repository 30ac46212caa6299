"""`saekit config`: asks about a run, plans it, and writes the files that start it.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.activations import no_bars
from saekit.wizard.ask import Defaults, Terminal
from saekit.wizard.draft import Draft, Targets, start, write_files
from saekit.wizard.finish import QUESTIONS, files_of, start_command
from saekit.wizard.walk import Asker, Back, walk

__all__ = [
    "QUESTIONS",
    "Asker",
    "Back",
    "Defaults",
    "Draft",
    "Targets",
    "Terminal",
    "files_of",
    "no_bars",
    "start",
    "start_command",
    "walk",
    "write_files",
]

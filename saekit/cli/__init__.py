"""The command line. Commands are thin: options to config to call; what is heavy is imported inside them.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.cli.app import main

__all__ = ["main"]

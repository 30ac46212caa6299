"""The command line. Commands are thin: options to config to call; what is heavy is imported inside them."""

from saekit.cli.app import main

__all__ = ["main"]

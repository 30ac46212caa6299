"""The version; nothing else defines it."""

__version__ = "0.1.0"

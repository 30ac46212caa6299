"""File formats for SAEs, one module each. `base` has the protocol that a format implements."""

from saekit.sae.formats.base import Format

__all__ = ["Format"]

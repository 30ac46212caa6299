"""Files in which SAEs are kept: one module per format. `base` says what a format tells about itself."""

from saekit.sae.formats.base import Format

__all__ = ["Format"]

"""Ways to choose a token's latents: one file each. `base` says what a kind tells about itself."""

from saekit.sae.selection.base import Selection

__all__ = ["Selection"]

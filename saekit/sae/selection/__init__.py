"""Selections: ways to choose a token's latents, one file each. `base` has the protocol that they implement."""

from saekit.sae.selection.base import Selection

__all__ = ["Selection"]

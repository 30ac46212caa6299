"""Defaults that `--help` shows, which imports none of the libraries that they are for."""

DEFAULT_TOKENS = 200_000
"""To evaluate on."""
DEFAULT_LATENTS = 32_768
"""Latents with contexts on a page, over all layers."""

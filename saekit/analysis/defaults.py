"""Defaults that `--help` shows, in a module that imports no heavy library."""

DEFAULT_TOKENS = 200_000
"""Tokens to evaluate on."""
DEFAULT_LATENTS = 32_768
"""Latents with contexts on a page, over all layers."""

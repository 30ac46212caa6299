"""Analyze finished SAEs: on held-out tokens, in the language model, latent by latent, and from their files."""

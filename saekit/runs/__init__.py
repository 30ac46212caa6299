"""Files of a run: its folder, its checkpoints and its metrics; writing, reading and finding them."""

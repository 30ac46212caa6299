"""What lies where on disk: a run's folder, its checkpoints and its metrics; writing, reading and finding them."""

"""What a run will cost before it is started: memory by placement, from the model's config alone."""

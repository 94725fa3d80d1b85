"""What is asked of a model by everybody: its digests, its wrappers, its processes, and quiet."""

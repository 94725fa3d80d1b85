"""The store: opening, writing, reading one steady view, and what it knows of models by their digests."""

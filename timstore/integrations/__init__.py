"""Thin adapters to other people's training loops; each imports what it adapts to, and nothing here does."""

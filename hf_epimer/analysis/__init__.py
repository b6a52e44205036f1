"""Looking at checkpoints and merges: diagnosis before merging, the loss landscape, sweeps, plots."""

RANKS = (4, 8, 16, 32)
"""Directions per task that a diagnosis looks at where none are named."""

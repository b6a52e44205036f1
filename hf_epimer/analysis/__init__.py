"""Looking at checkpoints and merges: diagnosis before merging, the loss landscape, sweeps, plots."""

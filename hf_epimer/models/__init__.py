"""What an architecture is, as data, and how a checkpoint becomes a model: files, base, weights, heads."""

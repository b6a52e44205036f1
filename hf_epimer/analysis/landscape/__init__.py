"""The loss landscape around fine-tuned models."""

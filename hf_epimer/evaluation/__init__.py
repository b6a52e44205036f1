"""Accuracy and predictions of a checkpoint on its tasks."""

"""Merging as such: tensors in, tensors out, one layer at a time. No files of models, no Hub, no model class."""

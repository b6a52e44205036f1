"""Safetensors files: a lazy reader, a streaming writer, and folders that are complete or not there."""

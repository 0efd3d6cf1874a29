"""Checkpoints on disk: config, safetensors headers, tensors, companion files."""

"""What is there: config, safetensors headers, tensors, companion files."""

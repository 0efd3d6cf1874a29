"""A Hub on loopback for tests: huggingface_hub itself talks to it, unpatched."""

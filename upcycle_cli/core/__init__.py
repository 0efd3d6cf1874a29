"""What every package builds on: errors, text for terminals, callbacks, safe files."""

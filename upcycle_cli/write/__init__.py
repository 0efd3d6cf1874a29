"""How a plan becomes files: evaluate, lay out, write, publish."""

"""The parts of `throughput.py`: what is measured, how, and against which limits."""

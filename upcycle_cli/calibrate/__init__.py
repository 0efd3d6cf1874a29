"""Calibration: run the dense model on a text, and fit router rows and neuron orders to it."""

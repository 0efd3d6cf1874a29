"""Calibration: run the dense model on a text, and fit router rows and neuron orders to it.

`collect` runs the model; `router_rows` and `neuron_clusters` fit in numpy.
"""

"""Dense models and mixtures run by transformers' own code, with their weights left on disk.

What runs models for `verify` and for the calibration of `convert` alike; it knows neither what a
conversion makes nor what a verification holds it to.
"""

"""Run dense models and mixtures of experts by transformers' own code, with weights left on disk.

Both `verify` and the calibration of `convert` use it. It knows nothing about conversions.
"""

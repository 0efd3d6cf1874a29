"""Run dense models and MoEs with transformers' own code, their weights left on disk.

`verify` and the calibration of `convert` use it. It knows nothing about conversions.
"""

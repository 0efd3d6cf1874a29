"""The calibration: the dense model runs once on a text, and tells what to make of it.

- text.py     which text
- found.py    what is kept of a calibration
- rows.py     from the inputs of a layer's MLP to router rows; numpy alone
- shards.py   from what neurons do to the order in which they are cut up; numpy alone
- passing.py  the run itself, a layer at a time; the only one that needs torch
"""

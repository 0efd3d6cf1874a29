"""The calibration: the dense model runs once on a text, and routers are fitted to what it sees.

- text.py     which text
- found.py    what is kept of a calibration
- rows.py     from the inputs of a layer's MLP to router rows; numpy alone
- passing.py  the run itself, a layer at a time; the only one that needs torch
"""

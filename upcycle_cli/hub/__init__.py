"""The Hugging Face Hub, through huggingface_hub: where sources come from and results go.

- sources.py   a repo's headers without its weights, and its files when they are wanted
- pushing.py   a finished output to a repo
- manifest.py   what of an output is published
- answers.py    checks of what the Hub answers
- licences.py  what a licence asks of whoever publishes a derived model
- requests.py  patience and words
"""

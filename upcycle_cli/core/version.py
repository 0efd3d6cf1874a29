"""The version of the installed package, which pyproject.toml sets."""

from importlib.metadata import version

__version__ = version("upcycle-cli")

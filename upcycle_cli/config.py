"""Recipe files: the options of `convert` as TOML or JSON, to keep beside the code and run again.

A file's options are defaults: the command line and the environment override them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_cli.errors import UpcycleError, shown
from upcycle_cli.printable import shell_line
from upcycle_cli.publish import replace_text

Value = str | int | float | bool


def load_config(path: Path, known: Mapping[str, bool]) -> dict[str, Value]:
    """Read a recipe file; returns its values by the names of `known`, with underscores.

    `known` says of each option whether it is one that is on or off. Raises UpcycleError when the
    file cannot be read, or says something that is not an option, or no value for it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if _is_json(path) else tomllib.loads(text)
    except OSError as error:
        raise UpcycleError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        kind = "JSON" if _is_json(path) else "TOML"
        raise UpcycleError(f"{path} is not valid {kind}: {error}.") from error
    if not isinstance(content, dict):
        raise UpcycleError(f"{path} does not hold a JSON object.")
    values: dict[str, Value] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            options = ", ".join(sorted(option.replace("_", "-") for option in known))
            raise UpcycleError(f"{path}: '{key}' is not an option.", f"There are: {options}.")
        if not isinstance(value, Value):
            raise UpcycleError(f"{path}: {key} must be a string, a number, true or false.")
        if isinstance(value, bool) and not known[name]:
            raise UpcycleError(f"{path}: {key} is not an option that is true or false.")
        # As on the command line, where the option itself says what a number is to it.
        values[name] = value if isinstance(value, bool) else str(value)
    return values


def save_config(path: Path, values: Mapping[str, Value]) -> None:
    """Write a recipe file, as JSON where its name says so; OSError when that fails.

    Raises UpcycleError for what is there and no file.
    """
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise UpcycleError(f"{path} is there, and no file.", "Name a file to write.")
    named = {name.replace("_", "-"): value for name, value in values.items()}
    if _is_json(path):
        text = json.dumps(named, indent=2, ensure_ascii=False) + "\n"
    else:
        import tomli_w

        command = shell_line(["upcycle", "convert", "--config", path.name])
        text = f"# {command}\n\n{tomli_w.dumps(named)}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UpcycleError(
            f"{path} cannot hold {shown(error.object[error.start : error.end])}, which a name has: "
            "recipe files are UTF-8.",
            "Rename it, or leave out --save-config.",
        ) from error
    replace_text(path, text)


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def as_values(parameters: Mapping[str, Any]) -> dict[str, Value]:
    """Return parsed options as a recipe file holds them; what was not given is left out."""
    return {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in parameters.items()
        if value is not None
    }

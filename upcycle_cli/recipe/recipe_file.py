"""Recipe files: the options of `convert` as TOML or JSON.

Command-line options and environment variables override them.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import is_in, read_small, write_whole
from upcycle_cli.core.text import choose_from, shell_line

Value = str | int | float | bool | list[str]
_TAKES = {str: "a string or a number", bool: "true or false", list: "a list of strings"}
_MOST_BYTES = 1_000_000  # more than any recipe file has


def load_config(path: Path, known: Mapping[str, type]) -> dict[str, Value]:
    """Return the options of a recipe file; raises UpcycleError.

    `known` has the type that each option takes: str, also for numbers, bool or list.
    """
    text = read_small(path, _MOST_BYTES).decode(errors="surrogateescape")
    try:
        content = json.loads(text) if _is_json(path) else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if _is_json(path) else "TOML"
        raise UpcycleError(f"{path} is not valid {kind}: {error}.") from error
    if not isinstance(content, dict):
        raise UpcycleError(f"{path} does not hold a JSON object.")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            options = sorted(option.replace("_", "-") for option in known)
            raise UpcycleError(f"{path}: '{key}' is not an option.", choose_from(key, options))
        # Numbers become text, as on the command line: the option parses its own.
        given = str(value) if type(value) in (int, float) else value
        items = given if isinstance(given, list) else []
        if type(given) is not known[name] or not all(isinstance(item, str) for item in items):
            raise UpcycleError(f"{path}: {key} must be {_TAKES[known[name]]}.")
        values[name] = given
    return values


def save_config(
    path: Path,
    values: Mapping[str, Value],
    known: Mapping[str, type],
    *,
    keep_out_of: Sequence[Path],
) -> None:
    """Write a recipe file, as JSON if its name ends in .json; OSError when that fails.

    Raises UpcycleError where it would replace anything but a recipe file, and for a path in
    one of the directories `keep_out_of`. `known` are all options, as in `load_config`.
    """
    named = {name.replace("_", "-"): value for name, value in values.items()}
    if _is_json(path):
        text = json.dumps(named, indent=2, ensure_ascii=False) + "\n"
    else:
        import tomli_w

        command = shell_line(["upcycle", "convert", "--config", path.name])
        text = f"# {command}\n\n{tomli_w.dumps(named)}"
    for directory in keep_out_of:
        if is_in(path.absolute().parent, directory):
            words = f"{path} would be in {directory}, where nothing else may be written."
            raise UpcycleError(words, "Save the options elsewhere.")
    is_free = not os.path.lexists(path)
    with suppress(OSError, UpcycleError):
        is_free = is_free or (not path.is_symlink() and "source" in load_config(path, known))
    if not is_free:
        words = f"{path} exists and is not a recipe file; it is not replaced."
        raise UpcycleError(words, "Name another file.")
    write_whole(path.absolute(), text.encode(errors="surrogateescape"))


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"

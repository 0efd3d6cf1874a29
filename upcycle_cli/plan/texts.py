"""The texts and prompts to run models on: reading them from files, and their digests.

Prompts are for merges: the hidden states of a model's prompts become its router rows. A YAML or
JSON file maps models to prompts; a mergekit-moe file has them, too, and is read as options of
`convert`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import MOST_JSON_BYTES, open_regular, read_small
from upcycle_cli.core.text import printable

BUILTIN = "builtin"
_MOST_CHARACTERS = 1_000_000
_KINDS = ("positive_prompts", "negative_prompts")
_FORM = (
    'Write {"MODEL": ["a prompt", …]} for each, or {"MODEL": {"positive_prompts": […], '
    '"negative_prompts": […]}}.'
)

_KNOWN = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "architecture")
_EXPERT = ("source_model", "positive_prompts", "negative_prompts")
_NEUTRAL = {"shared_experts": [], "noise_scale": 0, "residual_scale": 1}
"""Unsupported keys, with the values that change nothing."""
Value = str | bool | list[str]
_NORMAL: dict[str, Value] = {"router_init": "normal"}
_MEANINGS: dict[str, dict[str, dict[str, Value]]] = {
    "gate_mode": {
        "hidden": {},
        "random": _NORMAL,
        # Of rows uniform in ±1/√H, on inputs of root mean square 1.
        "uniform_random": {**_NORMAL, "router_logit_std": f"{1 / math.sqrt(3):.6g}"},
    },
    "dtype": {name: {"dtype": name} for name in ("bfloat16", "float16", "float32")},
    # The architectures that both tools write alike: no shared expert, and the same routing.
    "architecture": {
        "mixtral": {"target": "mixtral"},
        "qwen3": {"target": "qwen3_moe"},
        "qwen3 moe": {"target": "qwen3_moe"},
    },
}
"""Options of `convert` that mean the same as a value of a mergekit key."""

Text = str | list[dict[str, Any]]
"""A text, or the messages of a chat."""


@dataclass(frozen=True)
class CalibrationText:
    """Texts, their name, and the digest that identifies them."""

    name: str
    """`builtin`, or the name of the file without its directory."""
    texts: tuple[Text, ...]
    path: Path | None = None

    @property
    def digest(self) -> str:
        """The SHA-256 of all texts."""
        return _digest(self.texts)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def calibration_text(place: str | Path, what: str = "the calibration text") -> CalibrationText:
    """Return the built-in text, or the text of a file, which errors call `what`.

    Raises UpcycleError for an unreadable or empty file.
    """
    if str(place) == BUILTIN:
        return CalibrationText(BUILTIN, tuple(builtin_texts()))
    path = Path(place)
    return CalibrationText(printable(path.name), tuple(read_texts(path, what)), path)


def read_texts(path: Path, what: str) -> list[Text]:
    """Return the texts of a file; UpcycleError if it has none.

    The file is one text, or JSON Lines with a `text`, a `prompt` or the `messages` of a chat in
    each line. Errors call it `what`, such as "the prompts". Only its beginning is read if it is
    large.
    """
    try:
        with TextIOWrapper(open_regular(path), encoding="utf-8", newline="") as file:
            text, whole = file.read(_MOST_CHARACTERS), not file.read(1)
    except OSError as error:
        raise UpcycleError(f"cannot read {what} {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{what} {path} is not UTF-8 text.") from error
    if path.suffix == ".jsonl":
        lines = text.splitlines() if whole else text.splitlines()[:-1]
        found = [
            _of_line(f"{what} {path}", number, line) for number, line in enumerate(lines, 1) if line
        ]
    else:
        found = [text] if text.strip() else []
    if not found:
        raise UpcycleError(f"{what} {path} is empty.", "Give a file with some text.")
    return found


def _of_line(where: str, number: int, line: str) -> Text:
    with suppress(ValueError, RecursionError):
        item = json.loads(line)
        held = item if isinstance(item, dict) else {}
        text, messages = held.get("text", held.get("prompt")), held.get("messages")
        if isinstance(text, str) and text.strip():
            return text
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            return messages
    hint = 'A line is {"text": "…"}, {"prompt": "…"} or {"messages": [{"role": …, "content": …}]}.'
    raise UpcycleError(f"{where}: line {number} has neither text nor messages.", hint)


def builtin_texts() -> list[Text]:
    """Return English, other scripts, code, mathematics and two chats."""
    texts = files("upcycle_cli.plan") / "builtin_texts"
    names = ("english", "scripts", "code", "mathematics")
    found: list[Text] = [(texts / f"{name}.txt").read_text(encoding="utf-8") for name in names]
    chats = (texts / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    return found + [json.loads(line)["messages"] for line in chats]


@dataclass(frozen=True)
class ModelPrompts:
    """Prompts that should be routed to a model, and prompts that should not."""

    model: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()

    def means(self, model: Checkpoint) -> bool:
        """Whether these are prompts for `model`: by path, name or its end, or the adapter's."""
        name, parts = re.sub("@[^+]*", "", self.model), model.base_and_adapter
        signs = re.finditer(r"\+", name) if model.adapter is not None else ()
        splits = [[name], *([name[: sign.start()], name[sign.end() :]] for sign in signs)]
        return any(all(map(_means, reversed(split), reversed(parts))) for split in splits)


def _means(given: str, model: Checkpoint) -> bool:
    is_name = given in (model.name, model.name.rpartition("/")[2])
    return is_name or Path(given).resolve() == model.path.resolve()


@dataclass(frozen=True)
class Prompts:
    """The prompts of each model, and the name of their file."""

    name: str
    models: tuple[ModelPrompts, ...]

    @property
    def digest(self) -> str:
        """The SHA-256 of all prompts."""
        return _digest([asdict(model) for model in self.models])

    def of_groups(self, models: Sequence[Checkpoint]) -> tuple[ModelPrompts, ...]:
        """Return the prompts of each group, given the groups' models.

        A model with several groups needs as many entries. Raises UpcycleError if some are missing.
        """
        left, found = list(self.models), []
        for model in models:
            fits = next((each for each in left if each.means(model)), None)
            if fits is None:
                named = ", ".join(each.model for each in left) or "other groups"
                words = f"{self.name} has no prompts for {model.name}, only for {named}."
                raise UpcycleError(words, "Each virtual group needs its own prompts.")
            left.remove(fits)
            found.append(fits)
        if left:
            words = f"{self.name} has prompts for {left[0].model}, which gives no virtual group."
            raise UpcycleError(words)
        return tuple(found)


def read_yaml(path: Path) -> Any:  # noqa: ANN401 - any value
    """Return the plain values of a small YAML or JSON file; raises UpcycleError."""
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(read_small(path, MOST_JSON_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UpcycleError(f"{path} is not YAML: {shown(str(error))}.") from error


def place_of(value: object, path: Path, key: str = "source_model") -> str:
    """Return a model of a mergekit file in the form of `experts_from`; raises UpcycleError."""
    if isinstance(value, str) and value.strip():
        return value
    words = f"{path}: {key} must name a model, not {shown(value)}."
    raise UpcycleError(words, "Write its directory, REPO or REPO@REVISION, or BASE+ADAPTER.")


def read_prompts(path: Path) -> Prompts:
    """Return the prompts of a file; UpcycleError for an invalid one."""
    content = read_yaml(path)
    if isinstance(content, dict) and isinstance(content.get("experts"), list):
        items = [
            (place_of(each.get("source_model"), path), {key: each.get(key) for key in _KINDS})
            for each in content["experts"]
            if isinstance(each, dict)
        ]
    elif isinstance(content, dict):
        items = [(str(model), said) for model, said in content.items()]
    else:
        raise UpcycleError(f"{path} has no prompts for models.", _FORM)
    found = []
    for model, said in items:
        held = said if isinstance(said, dict) else {"positive_prompts": said}
        if odd := held.keys() - {*_KINDS}:
            raise UpcycleError(f"{path}: {model} has {shown(min(odd))}, which is unknown.", _FORM)
        positive, negative = (held.get(key) or [] for key in _KINDS)
        for key, texts in zip(_KINDS, (positive, negative), strict=True):
            are_texts = isinstance(texts, list) and all(isinstance(t, str) and t for t in texts)
            if not are_texts or not positive:
                raise UpcycleError(f"{path}: {key} of {model} must be a list of texts.", _FORM)
        found.append(ModelPrompts(model, tuple(positive), tuple(negative)))
    return Prompts(printable(path.name), tuple(found))


def read_mergekit(path: Path) -> dict[str, Value]:
    """Return a file's settings as options of `convert`.

    Raises UpcycleError, which names the key, for a setting that has no equivalent here.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise _refused(path, "base_model", "is missing")
    _check_keys(path, content, _KNOWN)
    experts = content.get("experts")
    if not isinstance(experts, list) or not experts:
        raise _refused(path, "experts", "must be a list of models")
    places = []
    for i, expert in enumerate(experts):
        held = expert if isinstance(expert, dict) else {}
        _check_keys(path, held, _EXPERT, f"experts[{i}].")
        places.append(place_of(held.get("source_model"), path, f"experts[{i}].source_model"))
    top_k = content.get("experts_per_token", 2)
    if type(top_k) is not int or top_k < 1:
        raise _refused(path, "experts_per_token", f"must be a positive integer, not {shown(top_k)}")
    base = place_of(content.get("base_model"), path, "base_model")
    base, at, revision = (base, "", "") if "+" in base else base.partition("@")
    found: dict[str, Value] = {
        "source": base,
        "recipe": f"E{len(places)}G1T{top_k}",
        "experts_from": places,
        "source_experts": False,
    }
    if at:
        found["revision"] = revision
    if content.get("gate_mode", "hidden") == "hidden":
        found["positive_prompts"] = str(path)
    for key, meanings in _MEANINGS.items():
        value = content.get(key)
        meaning = {} if value is None else meanings.get(str(value).lower())
        if meaning is None:
            raise _refused(path, key, f"is {shown(value)}; use {', '.join(meanings)}")
        found |= meaning
    return found


def _check_keys(path: Path, given: dict[Any, Any], known: tuple[str, ...], at: str = "") -> None:
    for key, value in given.items():
        if key not in known and value is not None and value != _NEUTRAL.get(key):
            raise _refused(path, f"{at}{key}", "is not supported")


def _refused(path: Path, key: str, why: str) -> UpcycleError:
    return UpcycleError(f"{path}: {key} {why}.", f"upcycle reads {', '.join(_KNOWN)}.")

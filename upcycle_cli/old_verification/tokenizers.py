"""Tokenizers: do two directories turn text into ids, and ids into text, alike?

convert copies the files, so first they are compared byte by byte: other engines read other files of
them than transformers does. Where they differ they are compared by meaning. Of what then still
differs, only what transformers itself rewrites when it saves a tokenizer is accepted, and noted.
The generation settings are compared in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, takewhile, zip_longest
from pathlib import Path
from typing import Any

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import (
    CONFIG_NAME,
    GENERATION_NAME,
    TOKENIZER_CONFIG_NAME,
    read_json,
)
from upcycle_cli.core.errors import UpcycleError, shown
from upcycle_cli.core.safe_files import MOST_COMPANION_BYTES, matches, read_small
from upcycle_cli.run.models import (
    TransformersError,
    load_tokenizer,
    tokenizer_files,
    transformers_says,
)

TOKENIZER_NAME = "tokenizer.json"
_TEMPLATES = ("chat_template*", "additional_chat_templates/*")

_NOTED: Mapping[str, str] = {
    "chat_template": "it may be a file of its own, and is compared by itself",
    "is_local": "transformers 5 notes where it came from",
    "local_files_only": "transformers 5 notes how it was loaded",
    "name_or_path": "it says where it was loaded from",
    "tokenizer_class": "transformers 5 names the class that does as tokenizer.json says",
    "transformers_version": "it says who saved it",
    # compared under one name, wherever they are
    "added_tokens_decoder": "transformers 5 leaves them to tokenizer.json",
    "additional_special_tokens": "transformers 5 calls them extra_special_tokens",
    "extra_special_tokens": "transformers 4 calls them additional_special_tokens",
}
"""Keys of tokenizer_config.json that saving adds or changes, and why that is no change."""

_LEFT_OUT: Mapping[str, str] = {
    "special_tokens_map_file": "it says where it was loaded from",
    "tokenizer_file": "it says where it was loaded from; transformers 4 obeys it",
}
"""Keys of it that saving drops; added, they would make a loader read another file."""

_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that do what tokenizer.json says, and nothing of their own."""

_ADDED = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "vocab.json")
"""Files that transformers 4 writes beside tokenizer.json: they have to say what that says."""

_DROPPED = (*_ADDED, "tokenizer.model*", "vocab.txt")
"""Files that transformers 5 leaves out when it saves: all that they say is in tokenizer.json."""

_GENERATION_USUAL: Mapping[str, Any] = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "return_dict_in_generate": False,
    "use_cache": True,
}
"""Generation settings that transformers adds or drops when it saves, being what it does anyway."""
_GENERATION_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

_MOST_DIFFERENCES = 5  # of a file: one token less, and all after it are others

_SAMPLES = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "Zażółć gęślą jaźń; Ünïcödé naïveté, 你好，世界, Привет, שלום, नमस्ते.",
    "Emoji: 🙂 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 and a zero-width\u200bspace.",
    "def f(x: int) -> int:\n\treturn x ** 2  # squared\n\n\nprint(f(3))\r\n",
    "   leading, trailing and    inner spaces   ",
)
_ATTRIBUTES = (
    *("all_special_tokens", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("model_max_length", "padding_side", "truncation_side"),
    *("clean_up_tokenization_spaces", "split_special_tokens"),
)


def compare_tokenizers(dense: Checkpoint, moe: Checkpoint) -> tuple[list[str], list[str]]:
    """Return how two tokenizers differ, as files and loaded, and notes on what is no change."""
    theirs, ours = set(tokenizer_files(dense)), set(tokenizer_files(moe))
    failures: list[str] = []
    notes = [] if theirs or ours else ["Neither model has a tokenizer."]
    if theirs and not ours:
        return ["the tokenizer is missing: the dense model has one"], notes
    for name in sorted(theirs | ours):
        if not matches(name, _TEMPLATES):
            failures += file_failures(dense, moe, name, notes)
    try:
        failures += _template_failures(dense, moe)
        failures += _class_failures(dense, moe, notes)
    except (UpcycleError, UnicodeDecodeError) as error:
        failures.append(f"the tokenizer cannot be read: {error}")
    if theirs and not failures:
        # A tokenizer that is not the dense model's can be made to run for ever.
        failures += _loading_failures(dense, moe, notes)
    return failures, notes


def file_failures(dense: Checkpoint, moe: Checkpoint, name: str, notes: list[str]) -> Iterator[str]:
    """Say how a file differs from the dense model's; what is no change is added to the notes."""
    theirs = contents(dense, name)
    try:
        ours = contents(moe, name)
    except UpcycleError as error:
        yield error.message
        return
    if theirs == ours:
        return
    if ours is None and matches(name, _DROPPED) and moe.storage.has(TOKENIZER_NAME):
        notes.append(f"{name} is not there: transformers 5 saves {TOKENIZER_NAME} in its place.")
    elif ours is None:
        yield f"{name} is missing: the dense model has one"
    elif theirs is None and name not in (*_ADDED, GENERATION_NAME):
        yield f"{name} is there, and the dense model has none"
    elif name not in _READERS:
        yield f"{name} is not the file of the dense model"
    else:
        yield from _meaning_failures(dense, moe, name, notes, is_added=theirs is None)


def _meaning_failures(
    dense: Checkpoint, moe: Checkpoint, name: str, notes: list[str], *, is_added: bool
) -> Iterator[str]:
    try:
        # What saving adds has to say what the tokenizer says already.
        wanted = _implied(moe, name) if is_added else _READERS[name](dense, name)
        held = _READERS[name](moe, name)
        if name == TOKENIZER_CONFIG_NAME:
            wanted = {k: v for k, v in wanted.items() if k not in _LEFT_OUT or k in held}
        differences = [*islice(_differences(wanted, held), _MOST_DIFFERENCES)]
    except (UpcycleError, TransformersError, ValueError) as error:
        yield f"{name} is not the file of the dense model, and unreadable: {error}"
        return
    origin = CONFIG_NAME if name == GENERATION_NAME else TOKENIZER_NAME
    for difference in differences:
        yield f"{name}: {difference} in {f'its {origin}' if is_added else 'the dense model'}"
    if not differences:
        notes.append(f"{name} was saved again, and says the same.")


def contents(checkpoint: Checkpoint, name: str) -> bytes | None:
    """Return what a file beside the weights holds, None when there is none; raises UpcycleError."""
    if not checkpoint.storage.has(name):
        return None
    return read_small(checkpoint.storage.local(name), MOST_COMPANION_BYTES)


def _json(checkpoint: Checkpoint, name: str) -> Any:  # noqa: ANN401 - a JSON value
    if not checkpoint.storage.has(name):
        return {}
    return read_json(checkpoint.storage.local(name), MOST_COMPANION_BYTES)


def _tokenizer(checkpoint: Checkpoint, name: str = TOKENIZER_NAME) -> Any:  # noqa: ANN401
    """Return a tokenizer.json as its library writes it, whoever wrote it."""
    text = read_small(checkpoint.storage.local(name), MOST_COMPANION_BYTES)
    with transformers_says():
        from tokenizers import Tokenizer

        return json.loads(Tokenizer.from_buffer(text).to_str())


def _settings(checkpoint: Checkpoint, name: str = TOKENIZER_CONFIG_NAME) -> dict[str, Any]:
    """Return what a tokenizer_config.json says, in one notation for all versions."""
    config = _json(checkpoint, name)
    settings = {
        key: _plain(value)
        for key, value in config.items()
        if key not in _NOTED and value not in (None, {}, [])
    }
    specials: set[str] = set()
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or ()
        tokens = tokens.values() if isinstance(tokens, dict) else tokens
        specials |= {str(_plain(token)) for token in tokens}
    return settings | {
        "added tokens": _added(checkpoint),
        "backend": config.get("backend", "tokenizers"),  # which transformers 5 adds
        "special tokens": sorted(specials),
    }


def _added(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the tokens that were added to the vocabulary, by id, and how text is split at them."""
    written = _json(checkpoint, TOKENIZER_CONFIG_NAME).get("added_tokens_decoder")
    if isinstance(written, dict):
        return written
    if not checkpoint.storage.has(TOKENIZER_NAME):
        return {}
    return {str(token.pop("id")): token for token in _tokenizer(checkpoint)["added_tokens"]}


def _class_failures(dense: Checkpoint, moe: Checkpoint, notes: list[str]) -> Iterator[str]:
    """Compare the classes that the tokenizers are said to be of."""
    configs = (_json(checkpoint, TOKENIZER_CONFIG_NAME) for checkpoint in (dense, moe))
    theirs, ours = (config.get("tokenizer_class") for config in configs)
    if theirs == ours:
        return
    if ours == "TokenizersBackend":
        # As transformers 5 saves any of them; whether it does the same is seen when it is loaded.
        notes.append(f"Its tokenizer_class is {ours}, which transformers 4 does not know.")
    elif not (theirs in _GENERIC_CLASSES and ours in _GENERIC_CLASSES):
        yield (
            f"{TOKENIZER_CONFIG_NAME}: tokenizer_class is {shown(ours)}, and it is {shown(theirs)} "
            "in the dense model"
        )


def _plain(value: object) -> object:
    """Return a token as its text, whichever way it is written down."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _special_tokens(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    found = {key: _plain(value) for key, value in _json(checkpoint, name).items()}
    found.pop("additional_special_tokens", None)  # tokenizer_config.json has them
    return found


def _generation(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return the generation settings without what transformers adds and drops by itself."""
    said = {key: value for key, value in _json(checkpoint, name).items() if value is not None}
    said.pop("transformers_version", None)
    return {key: value for key, value in said.items() if value is not _GENERATION_USUAL.get(key)}


def _merges(checkpoint: Checkpoint, name: str) -> list[str]:
    text = (contents(checkpoint, name) or b"").decode()
    lines = text.removesuffix("\n").split("\n")
    return lines[1:] if lines[0].startswith("#version") else lines


def _implied(checkpoint: Checkpoint, name: str) -> Any:  # noqa: ANN401
    """Return what a file has to say that transformers adds when it saves a model without one."""
    if name == GENERATION_NAME:
        config = checkpoint.config
        said = {key: config[key] for key in _GENERATION_TOKENS if config.get(key) is not None}
        return said | {"_from_model_config": True}
    if name == "special_tokens_map.json":
        config = _json(checkpoint, TOKENIZER_CONFIG_NAME)
        specials = _special_tokens(checkpoint, name)
        return {key: _plain(config[key]) for key in specials if key in config}
    tokenizer = _tokenizer(checkpoint)
    if name == "vocab.json":
        return tokenizer["model"].get("vocab")
    if name == "merges.txt":
        return [" ".join(pair) for pair in tokenizer["model"].get("merges", ())]
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


_READERS: Mapping[str, Callable[[Checkpoint, str], Any]] = {
    "added_tokens.json": _json,
    GENERATION_NAME: _generation,
    "merges.txt": _merges,
    "special_tokens_map.json": _special_tokens,
    TOKENIZER_NAME: _tokenizer,
    TOKENIZER_CONFIG_NAME: _settings,
    "vocab.json": _json,
}
"""How each file that can be compared by meaning is read; of the others every byte counts."""

_ABSENT = object()


def _differences(wanted: object, found: object) -> Iterator[str]:
    """Say where two JSON values differ, and how."""
    for place, one, other in _pairs(wanted, found, ""):
        if type(one) is not type(other) or one != other:
            held = "missing" if other is _ABSENT else shown(other)
            due = "there is no such thing" if one is _ABSENT else f"it is {shown(one)}"
            yield f"{place} is {held}, and {due}"


def _pairs(wanted: object, found: object, place: str) -> Iterator[tuple[str, object, object]]:
    """Yield what two JSON values hold at the same places, as deep as both go."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in wanted | found:
            inner = f"{place}.{key}" if place else str(key)
            yield from _pairs(wanted.get(key, _ABSENT), found.get(key, _ABSENT), inner)
    elif isinstance(wanted, list) and isinstance(found, list):
        for index, (one, other) in enumerate(zip_longest(wanted, found, fillvalue=_ABSENT)):
            yield from _pairs(one, other, f"{place}[{index}]")
    else:
        yield place, wanted, found


def _template_failures(dense: Checkpoint, moe: Checkpoint) -> Iterator[str]:
    theirs, ours = _templates(dense), _templates(moe)
    for name in sorted(theirs | ours):
        if theirs.get(name) != ours.get(name):
            which = "the chat template" if name == "default" else f"the chat template '{name}'"
            yield f"{which} is not the dense model's"


def _templates(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """Return the chat templates by name; several where loaders could take one or another."""
    held = _json(checkpoint, TOKENIZER_CONFIG_NAME).get("chat_template")
    named = held if isinstance(held, list) else [{"name": "default", "template": held}] * bool(held)
    found: dict[str, set[str]] = {}
    for entry in named:
        if isinstance(entry, dict):
            found.setdefault(str(entry.get("name")), set()).add(str(entry.get("template")))
    for name in tokenizer_files(checkpoint):
        if not matches(name, _TEMPLATES):
            continue
        text = (contents(checkpoint, name) or b"").decode()
        key = Path(name).stem if name.endswith(".jinja") else name
        found.setdefault("default" if key == "chat_template" else key, set()).add(text)
    return found


def _loading_failures(dense: Checkpoint, moe: Checkpoint, notes: list[str]) -> Iterator[str]:
    """Compare what transformers makes of the files, which depends on the model's type as well."""
    try:
        theirs = load_tokenizer(dense.path)
    except TransformersError as error:
        why = f"The dense model's tokenizer cannot be loaded here ({error})"
        notes.append(f"{why}, so only the files were compared.")
        return
    try:
        ours = load_tokenizer(moe.path)
        with transformers_says():
            yield from _loaded_failures(theirs, ours)
    except TransformersError as error:
        yield f"the tokenizer of the MoE cannot be used: {error}"


def _loaded_failures(dense: Any, moe: Any) -> Iterator[str]:  # noqa: ANN401
    specials = " ".join(str(token) for token in dense.all_special_tokens)
    for text in (*_SAMPLES, f"before {specials} after"):
        ids, moe_ids = (list(tokenizer(text)["input_ids"]) for tokenizer in (dense, moe))
        if ids != moe_ids:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(ids, moe_ids, strict=False))
            yield f"the tokenizers encode {text!r} differently from token {len([*same])} on"
        elif dense.decode(ids) != moe.decode(ids):
            yield f"the tokenizers decode the ids of {text!r} differently"
    # Samples cannot reach every token.
    if dense.get_vocab() != moe.get_vocab():
        changed = set(dense.get_vocab().items()) ^ set(moe.get_vocab().items())
        yield f"the tokenizers' vocabularies differ, for example at {min(changed)[0]!r}"
    for key in _ATTRIBUTES:
        ours, theirs = (getattr(tokenizer, key, None) for tokenizer in (moe, dense))
        if ours != theirs:
            yield f"{key} is {shown(ours)} as transformers loads it, {shown(theirs)} in the dense"

"""The code that is shipped with a model: is it ours, and to be run?

No code of a checkpoint is ever run. Where its text is what this version writes for its family, that
very code is run from here, and transformers is told that it knows the model type.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.safe_files import MOST_JSON_BYTES, read_small
from upcycle_cli.models.families import upcycled_family
from upcycle_cli.models.moe import Target
from upcycle_cli.models.shipped import CODE_NAME, UPCYCLED_PREFIX, auto_map, modeling_code
from upcycle_cli.models.wrappers import wrapper_of


def _code_for(model_type: str) -> str:
    wrapper = wrapper_of({"model_type": model_type})
    if wrapper is not None:
        return modeling_code(wrapper.classes, wrapped=True)
    return modeling_code(upcycled_family({"model_type": model_type}).class_names)


def code_failure(moe: Checkpoint, target: Target) -> str | None:
    """Say what is wrong with the code that an MoE ships, or None."""
    if not target.ships_code:
        return None
    try:
        held = read_small(moe.storage.local(CODE_NAME), MOST_JSON_BYTES)
    except (UpcycleError, OSError) as error:
        return f"{CODE_NAME} cannot be read: {error}"
    if held != _code_for(target.outer_type).encode():
        return f"{CODE_NAME} is not what this version of upcycle writes, so it is not run"
    if moe.config.get("auto_map") != auto_map(wrapped=target.inside is not None):
        return f"config.json: auto_map does not name the classes of {CODE_NAME}"
    return None


class _Text(importlib.abc.SourceLoader):
    def __init__(self, text: str) -> None:
        self._text = text

    def get_filename(self, fullname: str) -> str:
        return f"<{fullname}>"

    def get_data(self, path: str | bytes) -> bytes:  # noqa: ARG002 - a SourceLoader
        return self._text.encode()


@contextmanager
def known(model_type: str) -> Iterator[None]:
    """Make transformers know a model type whose code is shipped; any other it knows already.

    Not for longer: a caller's own model, loaded with its code, would be saved without it.
    """
    if not model_type.startswith(UPCYCLED_PREFIX):
        yield
        return
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    module = _classes(model_type)
    config = module.UpcycledConfig
    transformers.AutoConfig.register(model_type, config, exist_ok=True)
    named = auto_map(wrapped=wrapper_of({"model_type": model_type}) is not None)
    models = [(getattr(transformers, name), place) for name, place in named.items()][1:]
    for auto, place in models:
        auto.register(config, getattr(module, place.rpartition(".")[2]), exist_ok=True)
    try:
        yield
    finally:
        CONFIG_MAPPING._extra_content.pop(model_type, None)  # noqa: SLF001 - it has no other way
        for auto, _ in models:
            auto._model_mapping._extra_content.pop(config, None)  # noqa: SLF001


@cache
def _classes(model_type: str) -> ModuleType:
    name = f"{__package__}.{model_type}"
    spec = importlib.util.spec_from_loader(name, _Text(_code_for(model_type)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

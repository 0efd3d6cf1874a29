"""Run models with shipped code, without running code of a checkpoint.

The code that this version writes for the model type is registered with transformers while it is
needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from upcycle_cli.models.lookup import family_of
from upcycle_cli.models.shipped import UPCYCLED_PREFIX, auto_map, modeling_code
from upcycle_cli.models.wrappers import wrapper_of


def _code_for(model_type: str) -> str:
    wrapper = wrapper_of({"model_type": model_type})
    if wrapper is not None:
        return modeling_code(wrapper.classes, wrapped=True)
    return modeling_code(family_of({"model_type": model_type}).classes)


@contextmanager
def registered(model_type: str) -> Iterator[None]:
    """Register a model type with shipped code while the context lasts."""
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
        CONFIG_MAPPING._extra_content.pop(model_type, None)  # noqa: SLF001 - the only way
        for auto, _ in models:
            auto._model_mapping._extra_content.pop(config, None)  # noqa: SLF001


@cache
def _classes(model_type: str) -> ModuleType:
    module = ModuleType(f"{__package__}.{model_type}")
    sys.modules[module.__name__] = module
    module.__file__ = f"<{module.__name__}>"
    code = compile(_code_for(model_type), module.__file__, "exec", dont_inherit=True)
    exec(code, module.__dict__)  # noqa: S102 - it is ours
    return module

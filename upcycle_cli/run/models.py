"""Calls into transformers: configs, empty models and tokenizers.

Its warnings, progress bars and log lines are hidden, and its errors about a damaged checkpoint
become a `TransformersError`. Nothing here goes online, and no code of a checkpoint runs: the code
that this version writes for a model type is registered with transformers while it is needed.
"""

from __future__ import annotations

import errno
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, TypeAlias

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import CONFIG_NAME, GENERATION_NAME, UNREAD, read_json
from upcycle_cli.core.errors import UpcycleError, lack_in_words
from upcycle_cli.core.safe_files import matches
from upcycle_cli.models.defaults import class_names
from upcycle_cli.models.lookup import family_of
from upcycle_cli.models.shipped import UPCYCLED_PREFIX, auto_map, modeling_code
from upcycle_cli.models.wrappers import wrapper_of

Config: TypeAlias = Any
Model: TypeAlias = Any
"""transformers has no types."""

# Without an answer about remote code, transformers may ask on the terminal.
_OFFLINE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_SYSTEM_REFUSALS = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE)


class TransformersError(Exception):
    """transformers failed; the message is its own."""


def check_transformers() -> None:
    """Raise UpcycleError if the installed transformers is too old; imports nothing."""
    found = next((each.version for each in distributions(name="transformers")), "5")
    if int(found.partition(".")[0]) < 5:
        raise UpcycleError(
            f"running a model needs transformers 5 or newer; {found} is installed.",
            "Upgrade: pip install 'transformers>=5'. Without it you can convert, inspect, and "
            "compare the weights: upcycle verify DENSE MOE --checks weights",
        )


def _import_transformers() -> None:
    check_transformers()
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    except Exception as error:
        # A broken installation can also raise AttributeError or OSError.
        words = " ".join(str(error).split()) or type(error).__name__
        hint = "Install it again: pip install --force-reinstall transformers"
        raise UpcycleError(f"transformers cannot be imported: {words[:300]}", hint) from error


@contextmanager
def transformers_errors() -> Iterator[None]:
    """Keep transformers quiet and offline, and turn what it raises into TransformersError."""
    _import_transformers()
    from huggingface_hub import constants
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline = constants.HF_HUB_OFFLINE
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    # A checkpoint can name repos in places that no option covers.
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, UpcycleError):
        raise
    except BaseException as error:
        lack = lack_in_words(error)
        if lack is not None:
            raise lack from error
        # Panics of the tokenizers library do not derive from Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # A damaged checkpoint makes transformers raise nearly anything: OSError, ValueError,
        # KeyError, ZeroDivisionError. All are findings, except what the system refuses.
        if isinstance(error, OSError) and error.errno in _SYSTEM_REFUSALS:
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        raise TransformersError(f"{type(error).__name__}: {words[:300]}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def source_errors(path: Path) -> Iterator[None]:
    """Raise UpcycleError if transformers cannot run the source of a conversion."""
    try:
        with transformers_errors():
            yield
    except TransformersError as error:
        raise UpcycleError(f"transformers cannot run {path}: {error}") from error


def load_config(path: Path) -> Config:
    """Return transformers' config of a checkpoint; raises TransformersError."""
    with transformers_errors(), registered(_model_type(path)):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, **_OFFLINE)
        text = config.get_text_config()
        if getattr(text, "is_heterogeneous", False):
            # Otherwise reading a setting that differs between layers is an error.
            text.allow_global_per_layer_attribute_access = True
        return config


def saved_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config that transformers saves, and all values of its class; TransformersError."""
    with TemporaryDirectory(prefix="upcycle-config-") as scratch:
        path = Path(scratch)
        (path / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        loaded = load_config(path)
        with transformers_errors():
            saved, whole = (loaded.to_json_string(use_diff=diff) for diff in (True, False))
        return json.loads(saved), json.loads(whole)


def _model_type(path: Path) -> str:
    return str(read_json(path / CONFIG_NAME).get("model_type"))


def empty_model(config: Config, device: str) -> Model:
    """Return a model without loaded weights, in evaluation mode, on a torch device."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    auto = transformers.AutoModel  # some text models exist only as a part of a wrapper
    with torch.device(device), registered(config.model_type):
        if config.get_text_config() is not config:
            auto = transformers.AutoModelForImageTextToText
        elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            auto = transformers.AutoModelForCausalLM
        return auto.from_config(config).eval()


def decoder_layers(model: Model) -> Model:
    """Return the layers of a causal LM, or of the text model inside a wrapper."""
    from torch.nn import ModuleList

    base = model.base_model
    text = getattr(base, "language_model", getattr(base, "text_model", base))
    text = getattr(text, "decoder", text)
    return next(child for child in text.children() if isinstance(child, ModuleList))


def names_on_disk(model: Model, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's tensors as `save_pretrained` writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def load_tokenizer(path: Path) -> Any:  # noqa: ANN401
    """Return the tokenizer of a directory; raises TransformersError."""
    with transformers_errors(), registered(_model_type(path)):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, **_OFFLINE)


def tokenizer_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the files that hold a checkpoint's tokenizer, if any."""
    others, files = (GENERATION_NAME, *UNREAD), checkpoint.companions
    return tuple(file.name for file in files if not matches(file.name, others))


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
    """Return a module with the code that is shipped with a model type."""
    config = {"model_type": model_type}
    wrapper = wrapper_of(config)
    shipped = class_names((wrapper or family_of(config)).model_type)
    module = ModuleType(f"{__package__}.{model_type}")
    sys.modules[module.__name__] = module
    module.__file__ = f"<{module.__name__}>"
    text = modeling_code(shipped, text_model=None if wrapper is None else wrapper.text)
    code = compile(text, module.__file__, "exec", dont_inherit=True)
    exec(code, module.__dict__)  # noqa: S102 - it is ours
    return module

"""Everything that transformers is asked: configs, empty models, loaded models, tokenizers.

Its warnings, progress bars and log lines stay off the user's screen, and whatever it raises on a
damaged checkpoint becomes a `TransformersError` with what it said. Nothing here goes online.
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from upcycle_cli.checkpoint.checkpoint import Checkpoint
from upcycle_cli.checkpoint.storage import CONFIG_NAME, GENERATION_NAME, read_json
from upcycle_cli.core.errors import UpcycleError, lack_in_words
from upcycle_cli.models.moe import Target
from upcycle_cli.models.shipped import auto_map
from upcycle_cli.run.shipped import known

Shapes = dict[str, tuple[int, ...]]
Config: TypeAlias = Any
Model: TypeAlias = Any
"""Transformers has no types to name."""

# What is not trusted outright, it may ask about on the terminal.
_OFFLINE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_SYSTEM_REFUSALS = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE)


class TransformersError(Exception):
    """Transformers refused, in its own words."""


def _transformers() -> tuple[Any, Any, Any]:
    """Return AutoConfig, AutoModelForCausalLM and AutoTokenizer; UpcycleError for no import."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except Exception as error:
        # A broken installation raises ImportError mostly, but AttributeError or OSError as well,
        # from a library that does not fit.
        words = " ".join(str(error).split()) or type(error).__name__
        raise UpcycleError(
            f"transformers cannot be imported: {words[:300]}",
            "Install it again: pip install --force-reinstall transformers",
        ) from error
    return AutoConfig, AutoModelForCausalLM, AutoTokenizer


@contextmanager
def transformers_says() -> Iterator[None]:
    """Keep transformers quiet and offline, and turn what it raises into TransformersError."""
    _transformers()
    from huggingface_hub import constants
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline = constants.HF_HUB_OFFLINE
    _let_say(logging.CRITICAL)
    logging.disable_progress_bar()
    # A checkpoint can name repos in more places than there are options to forbid it.
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
        # The tokenizers library panics where it was not made for its input, outside of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # There is no list of what a damaged checkpoint can make transformers raise: OSError and
        # ValueError, but KeyError, ZeroDivisionError and huggingface_hub's own as well. All of it
        # is a finding about the checkpoint, but for what the system refuses.
        if isinstance(error, OSError) and error.errno in _SYSTEM_REFUSALS:
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        raise TransformersError(f"{type(error).__name__}: {words[:300]}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline
        _let_say(verbosity)
        if bars:
            logging.enable_progress_bar()


def _let_say(verbosity: int) -> None:
    from transformers.utils import logging

    if logging.get_verbosity() != verbosity:  # since to set it is to visit every logger there is
        logging.set_verbosity(verbosity)


def load_config(path: Path) -> Config:
    """Return transformers' config of a checkpoint; raises TransformersError."""
    auto_config, _, _ = _transformers()
    with transformers_says(), known(_model_type(path)):
        config = auto_config.from_pretrained(path, **_OFFLINE)
        text = config.get_text_config()
        if getattr(text, "is_heterogeneous", False):
            # Else whoever asks for what only some layers have otherwise is refused.
            text.allow_global_per_layer_attribute_access = True
        return config


def saved_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what transformers saves of a config, and every value that its class has for it.

    Raises TransformersError.
    """
    with TemporaryDirectory(prefix="upcycle-config-") as scratch:
        path = Path(scratch)
        (path / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        loaded = load_config(path)
        with transformers_says():
            saved, whole = (loaded.to_json_string(use_diff=diff) for diff in (True, False))
        return json.loads(saved), json.loads(whole)


def _model_type(path: Path) -> str:
    return str(read_json(path / CONFIG_NAME).get("model_type"))


def empty_shapes(path: Path, *, layers: int | None = None, **sizes: int) -> tuple[Shapes, Shapes]:
    """Return the tensors' shapes that config.json implies, as held in memory and as released.

    `sizes` are settings to be changed before, and `layers` is how many of the first are wanted, all
    unless given. It costs no memory; raises TransformersError.
    """
    config = load_config(path)
    with transformers_says():
        text = config.get_text_config()
        for key, value in sizes.items():
            setattr(text, key, value)
        if layers is not None:
            shorten(text, layers)
        model = empty_model(config, "meta")
        held = model.state_dict()
        return _shapes(held), _shapes(names_on_disk(model, held))


def _shapes(tensors: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def shorten(config: Config, layers: int) -> None:
    """Leave a config its first layers, and what it says of each of them."""
    total = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, value[:layers])
    if hasattr(config, "moe_layers"):
        config.moe_layers = [layer for layer in config.moe_layers if layer < layers]
    if hasattr(config, "num_kv_shared_layers"):
        first = total - config.num_kv_shared_layers  # from which on they take others' keys
        config.num_kv_shared_layers = max(0, layers - first)
    config.num_hidden_layers = layers


def empty_model(config: Config, device: str) -> Model:
    """Return a model that no weights were loaded for, in evaluation mode, on torch's device."""
    import torch

    with torch.device(device), known(config.model_type):
        return _auto_class(config).from_config(config).eval()


def _auto_class(config: Config) -> Any:  # noqa: ANN401
    """Return the class that makes the whole model of a config."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.get_text_config() is not config:
        return transformers.AutoModelForImageTextToText
    # Some text models are nothing but a part of another.
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel


def decoder_layers(model: Model) -> Model:
    """Return the list of the layers of a causal LM, or of the text model inside of another."""
    from torch.nn import ModuleList

    base = model.base_model
    text = getattr(base, "language_model", base)
    return next(child for child in text.children() if isinstance(child, ModuleList))


def class_of(target: Target) -> str:
    """Return the name of an architecture's class, of transformers' or of the shipped code."""
    from transformers.models.auto import modeling_auto

    if target.ships_code:
        *_, place = auto_map(wrapped=target.inside is not None).values()
        return place.rpartition(".")[2]
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if target.inside is not None:
        names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return str(names[target.outer_type])


def names_on_disk(model: Model, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's tensors as `save_pretrained` writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def load_tokenizer(path: Path) -> Any:  # noqa: ANN401
    """Return the tokenizer of a directory; raises TransformersError."""
    _, _, auto_tokenizer = _transformers()
    with transformers_says(), known(_model_type(path)):
        return auto_tokenizer.from_pretrained(path, **_OFFLINE)


def tokenizer_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the files that hold a checkpoint's tokenizer, if any."""
    others = (GENERATION_NAME, "LICEN", "NOTICE", "USE_POLICY")
    names = (file.name for file in checkpoint.companions)
    return tuple(name for name in names if not name.startswith(others))

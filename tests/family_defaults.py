"""Generates `upcycle_cli/models/knowledge/defaults.json` from transformers.

    python tests/family_defaults.py [--write]

prints the file, or writes it. The config classes declare the defaults. A tiny model of each type
saves the tensors: each of its sizes stands for one dimension, and every boolean
of its config is flipped once, to see which tensors depend on it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from safetensors import safe_open
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from upcycle_cli.models import dense_rows as families
from upcycle_cli.models.moe_rows import GROW_ONLY, NATIVE, WRAPPED_TARGETS
from upcycle_cli.models.wrappers import WRAPPERS, replace_parts

TARGET = Path(__file__).parent.parent / "upcycle_cli" / "models" / "knowledge" / "defaults.json"

DENSE, MOE = tuple(families.DENSE), (*NATIVE, *GROW_ONLY)
TEXTS = {*WRAPPED_TARGETS, *(name for row in WRAPPERS.values() for name in row.texts)} - {*DENSE}
"""Text models that exist only inside wrappers."""
WHOLE = {name for row in WRAPPERS.values() for name in (row.model_type, row.native)}
WITHOUT_TABLE = {
    *("apertus", "apertus1p5_text", "biogpt", "cohere_compass_text", "doge"),
    *("internlm3", "minicpm3", "persimmon", "phi"),
    *("stablelm", "gpt_neox", "youtu", "nemotron_h"),
    *(name for name, row in families.DENSE.items() if row.keys or row.layers_differ),
}
"""Types without a table of tensors: their layers differ, or their shapes depend on special keys."""

SIZES = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
DIMENSIONS = (
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_attention_heads*head_dim",
    "num_key_value_heads*head_dim",
    "num_attention_heads*head_dim+2*num_key_value_heads*head_dim",
    "3*num_attention_heads*head_dim",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "2*intermediate_size",
)
"""Of two that are the same size, which is so where heads make up the hidden size, the last."""
Shapes = dict[str, tuple[int, ...]]
_LAYER = re.compile(r"model\.layers\.\d+\.(?P<name>.+)")


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    text = formatted(generated())
    if sys.argv[1:] == ["--write"]:
        TARGET.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


def generated(dense: Sequence[str] = DENSE) -> dict[str, Any]:
    """Return what the file must hold of dense types for the transformers that is installed."""
    alone = {*dense, *MOE} - TEXTS - WHOLE
    return {
        "transformers": installed(),
        # Some activations have weights of their own, which no row has a place for.
        "activations": sorted({*ACT2CLS} - {"prelu", "xielu"}),
        "rope_kinds": ["default", *sorted({*ROPE_INIT_FUNCTIONS} - {"default", "proportional"})],
        "defaults": {name: defaults(name) for name in sorted({*alone, *TEXTS, *WHOLE})},
        "classes": {name: classes(name) for name in sorted({*alone, *WHOLE})},
        "tensors": {name: tensors(name) for name in sorted(alone & {*dense} - WITHOUT_TABLE)},
    }


def installed() -> str:
    return ".".join(transformers.__version__.split(".")[:2])


def formatted(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


# Defaults ----------------------------------------------------------------------------------------


def config_class(model_type: str) -> Any:  # noqa: ANN401 - transformers is untyped
    return transformers.CONFIG_MAPPING[model_type]


def classes(model_type: str) -> list[str | None]:
    """Return the names of the config, the base model and the causal language model."""
    whole = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    base = MODEL_MAPPING_NAMES.get(model_type)
    if model_type in WHOLE:
        whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
        base = base or whole.replace("ForConditionalGeneration", "Model")
    return [config_class(model_type).__name__, base, whole]


def declared(model_type: str) -> dict[str, Any]:
    """Return the defaults that a config class states itself, its base class aside."""
    common = {field.name for field in fields(transformers.PreTrainedConfig)}
    return {
        field.name: field.default
        for field in fields(config_class(model_type))
        if field.name not in common
    }


def defaults(model_type: str) -> dict[str, Any]:
    if model_type in WHOLE:
        tied = getattr(config_class(model_type)(), "tie_word_embeddings", False)
        return {"tie_word_embeddings": bool(tied)}
    result = declared(model_type)
    # Keys that only the model asks for, falling back on what it derives: head_dim, mostly.
    source = inspect.getsource(_model_module(model_type))
    for key in re.findall(r'getattr\((?:self\.)?config, "([a-z]\w*)"', source):
        result.setdefault(key, None)
    rope = getattr(config_class(model_type)(), "rope_parameters", None)
    # Where the usual is stretched, or differs by layer, what is absent stays so.
    if model_type in TEXTS:
        return {key: _as_json(value) for key, value in sorted(result.items())}  # which stays
    if rope is not None and rope.pop("rope_type", None) == "default":
        assert rope.keys() <= {"rope_theta", "partial_rotary_factor"}
        result |= {"rope_scaling": None, **rope}
    return {key: _as_json(value) for key, value in sorted(result.items())}


def _as_json(value: Any) -> Any:  # noqa: ANN401 - any default
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        assert value == math.inf
        return {"__float__": "Infinity"}  # as transformers writes it into config.json
    assert value is None or isinstance(value, bool | int | float | str)
    return value


# Tensors -----------------------------------------------------------------------------------------


def tiny_config(model_type: str, **flags: bool) -> Any:  # noqa: ANN401 - transformers is untyped
    settings: dict[str, Any] = {**SIZES, **flags, "num_hidden_layers": 2}
    # They must be in the vocabulary; which tokens are special changes no shape.
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    return config_class(model_type)(**settings)


def _model_class(model_type: str) -> Any:  # noqa: ANN401 - transformers is untyped
    config = config_class(model_type)
    whole, alone = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING
    return (whole if config in whole else alone)[config]


def _model_module(model_type: str) -> ModuleType:
    config = config_class(model_type)
    if config in transformers.MODEL_MAPPING:
        return importlib.import_module(_model_class(model_type).__module__)
    # Only a wrapper builds these text models.
    return importlib.import_module(config.__module__.replace("configuration_", "modeling_"))


def saved(model_type: str, **flags: bool) -> Shapes:
    """Return the tensors of a tiny model as its file names them, in the model's own order."""
    model = _model_class(model_type)(tiny_config(model_type, **flags))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        with safe_open(Path(directory) / "model.safetensors", framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    renamed = families.DENSE[model_type].renamed
    shapes = {replace_parts(name, renamed): shape for name, shape in shapes.items()}
    return {name: shapes[name] for name in model.state_dict() if name in shapes}


def tensors(model_type: str) -> dict[str, Any]:
    """Return the table of a dense model type: the form of each shape, outside and within layers."""
    flags = {key: value for key, value in declared(model_type).items() if isinstance(value, bool)}
    by_default = saved(model_type)
    shapes, conditions = dict(by_default), dict[str, str]()
    for flag, default in flags.items():
        flipped = saved(model_type, **{flag: not default})
        for name in by_default.keys() ^ flipped.keys():
            assert name not in conditions, f"{name} depends on more than {flag}"
            present_if_true = (name in by_default) is default
            conditions[name] = f" if {flag}" if present_if_true else f" unless {flag}"
        assert all(flipped[name] == shapes[name] for name in by_default.keys() & flipped.keys())
        shapes |= {name: shape for name, shape in flipped.items() if name not in shapes}
    forms, table = _forms(model_type), dict[str, dict[str, str]](outside={}, layer={})
    for name, shape in shapes.items():
        form = ",".join(forms[size] for size in shape) + conditions.get(name, "")
        if found := _LAYER.fullmatch(name):
            known = table["layer"].setdefault(found["name"], form)
            assert known == form, f"{name} differs from layer to layer"
        else:
            table["outside"][name] = form
    return table


def _forms(model_type: str) -> dict[int, str]:
    """Return what each size that can occur stands for."""
    model = _model_class(model_type)(tiny_config(model_type))
    # Some derive it whatever the config says.
    head_dim = next(m.head_dim for m in model.modules() if hasattr(m, "head_dim"))
    sizes, forms = {**SIZES, "head_dim": head_dim}, {}
    for form in DIMENSIONS:
        terms = [[sizes.get(factor, factor) for factor in t.split("*")] for t in form.split("+")]
        forms[sum(math.prod(map(int, term)) for term in terms)] = form
    assert len(DIMENSIONS) - len(forms) <= 1, "two dimensions have the same size"
    return forms


if __name__ == "__main__":
    main()

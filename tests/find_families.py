"""Lists the dense decoders of the installed transformers that have no row.

    python tests/find_families.py [TYPE ...]

walks its causal language models and prints each dense decoder without a row and without a reason in
knowledge/refused.json. For a TYPE it prints the classes and the tensors of a tiny model, from which
a row is written: see docs/families.md.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from conftest import sizes_of
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.lookup import REFUSED

UNMADE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(RuntimeError, StrictDataclassError, TypeError, ValueError),
)
"""What transformers raises for sizes that fit no model of a type."""
LAYERS = 4
"""Some mixtures of experts keep their first layers dense."""
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    for model_type in sys.argv[1:]:
        print(f"{model_type}: {REFUSED.get(model_type, 'no reason against it is known')}")
        model = made(model_type, sizes_of(model_type))
        print(*(type(each).__name__ for each in (model.config, model.base_model, model)))
        for name, tensor in model.state_dict().items():
            print(f"    {name} {tuple(tensor.shape)}")
    if not sys.argv[1:]:
        print("\n".join(sorted({*dense_decoders()} - {*DENSE, *REFUSED})))


def dense_decoders() -> Iterator[str]:
    """Yield the model types of causal language models that are dense, and decoders alone."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        kind = CONFIG_MAPPING[model_type]
        try:
            config = kind()
        except StrictDataclassError:
            continue  # a part of another model, without sizes of its own
        if model_type != config.model_type:
            continue  # another name for a type
        if any(part is AutoConfig or part.model_type for part in kind.sub_configs.values()):
            continue  # a model around others
        if config.is_encoder_decoder or (hasattr(config, "is_decoder") and sees_ahead(model_type)):
            continue  # an encoder that can be configured as a decoder
        if not is_mixture(model_type):
            yield model_type


def is_mixture(model_type: str) -> bool:
    """Whether a model type has experts, and cannot do without them."""
    kind = CONFIG_MAPPING[model_type]
    classes = vars(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[kind].__module__])
    if not any(name.endswith("Experts") for name in classes):
        return False
    known = {*kind().to_dict(), *kind.attribute_map}
    for sizes in ({key: value for key, value in SIZES.items() if key in known}, {}):
        try:
            return is_mixture_of(model_type, sizes)
        except UNMADE:
            continue
    return True


def is_mixture_of(model_type: str, sizes: Mapping[str, Any]) -> bool:
    """Whether a model of these sizes has experts; raises one of UNMADE if there is none."""
    config = CONFIG_MAPPING[model_type](**sizes)
    if "moe" in (getattr(config, "layer_types", None) or ()):
        return False  # layers with experts are optional
    none = {key: 0 for key, held in config.to_dict().items() if key.endswith("experts") and held}
    try:
        left = made(model_type, {**sizes, **none})
    except UNMADE:
        left = None
    if left is not None and has_experts(left):
        return True
    whole = made(model_type, sizes)
    stays = left is not None and {*left.state_dict()} < {*whole.state_dict()}
    return has_experts(whole) and not stays


def made(model_type: str, sizes: Mapping[str, Any], device: str = "meta") -> Any:  # noqa: ANN401
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")  # about sizes that nobody trains
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes)).eval()


def has_experts(model: nn.Module) -> bool:
    return any(type(module).__name__.endswith("Experts") for module in model.modules())


def sees_ahead(model_type: str) -> bool:
    """Whether logits depend on later tokens, as in encoders."""
    ids = torch.arange(2, 10)[None]
    changed = torch.cat((ids[:, :4], ids[:, :4]), dim=1)
    try:
        model = made(model_type, {**sizes_of(model_type), "pad_token_id": 0}, "cpu")
    except UNMADE:
        return False  # a person will see
    try:
        with torch.no_grad():
            first, other = (model(given).logits[:, :4] for given in (ids, changed))
    except UNMADE:
        return True  # it needs more than a text
    return not torch.equal(first, other)


if __name__ == "__main__":
    main()

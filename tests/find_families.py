"""Finds the dense decoders of the transformers that is installed, and what a row of one would say.

    python tests/find_families.py [TYPE ...]

walks its causal language models and prints each that is a dense decoder and no row, with its layers
as a tiny model has them: the names and shapes that `mlp` and `norm` are to say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from upcycle_cli.families.dense_rows import DENSE
from upcycle_cli.families.refused import REFUSED

MIXED_IN = ("expert", "moe_")
"""Parts of the keys of a mixture of experts."""
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    for model_type in sys.argv[1:] or sorted({*dense_decoders()} - {*DENSE}):
        known = "it has a row" if model_type in DENSE else "no row, and no reason why not"
        print(f"{model_type}: {REFUSED.get(model_type, known)}")
        for name, shape in layer_of(model_type):
            print(f"    {name} {shape}")


def dense_decoders() -> Iterator[str]:
    """Yield the model types of causal language models that are dense, and decoders alone."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        kind = CONFIG_MAPPING[model_type]
        try:
            config = kind()
        except StrictDataclassError:
            continue  # it is a part of another model, and has no sizes of its own
        keys = {*vars(config), *kind.attribute_map}
        is_other = (
            model_type != config.model_type  # another name for a type that is there, too
            or (kind.sub_configs and model_type not in DENSE.keys() | REFUSED.keys())
            or getattr(config, "is_encoder_decoder", False)
            or is_encoder(config)
            or any(
                key.startswith(MIXED_IN) or "_expert" in key[1:] for key in keys if key[0] != "_"
            )
        )
        if not is_other or model_type in DENSE:
            yield model_type


def is_encoder(config: Any) -> bool:  # noqa: ANN401 - transformers is untyped
    """Whether a model is made to see all of a text, and decodes only when it is told to."""
    return not getattr(config, "is_decoder", True) or config.model_type in {"xlm", "xlnet", "trocr"}


def layer_of(model_type: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of the first layer; nothing where no tiny model can be made."""
    kind = CONFIG_MAPPING[model_type]
    try:
        config = kind(**{k: v for k, v in SIZES.items() if hasattr(kind(), k)})
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (AttributeError, KeyError, StrictDataclassError, TypeError, ValueError) as error:
        print(f"    no tiny model: {str(error).splitlines()[0]}")
        return []
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    first = next(lists, [None])[0]
    return [] if first is None else [(n, tuple(p.shape)) for n, p in first.named_parameters()]


if __name__ == "__main__":
    main()

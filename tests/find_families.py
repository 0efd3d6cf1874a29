"""Finds the dense decoders of the transformers that is installed, and proposes a row for each.

    python tests/find_families.py [TYPE ...]

walks its causal language models and prints each that is a dense decoder and no row: why it cannot
be one, or the row that a tiny model of it has, with what no model shows. Of a TYPE it prints that
whatever it is, and the tensors of a layer that has an MLP.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from proposed_rows import UNMADE, UntoldError, made, proposed, tiny
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.families import REFUSED

EXPERTS = "Experts"
"""How the name of a class ends that holds experts."""
LAYERS = 4
"""More than the first ones that some mixtures of experts keep dense."""
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
    transformers.utils.logging.disable_progress_bar()
    if types := sys.argv[1:]:
        for model_type in types:
            describe(model_type, in_full=True)
        return
    without = sorted({*dense_decoders()} - {*DENSE})
    for model_type in without:
        describe(model_type, in_full=False)
    new = sum(model_type not in REFUSED for model_type in without)
    print(f"Dense decoders without a row: {len(without)}; without a reason for that: {new}.")


def describe(model_type: str, *, in_full: bool) -> None:
    """Print what is known of a type, and its row where nothing is, or in full."""
    known = "it has a row" if model_type in DENSE else "it has no row"
    say(f"{model_type}: {REFUSED.get(model_type, known)}", before="")
    if model_type in REFUSED and not in_full:
        return
    try:
        found = proposed(model_type)
    except UntoldError as error:
        say(f"no row to propose: {error}")
        return
    print(textwrap.indent(str(found), "    "))
    say(f"look at: {'; '.join(found.look_at)}")
    if in_full:
        for name, shape in found.layer.items():
            print(f"    {name} {shape}")


def say(text: str, *, before: str = "    ") -> None:
    print(textwrap.fill(text, 80, initial_indent=before, subsequent_indent="    "))


def dense_decoders() -> Iterator[str]:
    """Yield the model types of causal language models that are dense, and decoders alone."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        kind = CONFIG_MAPPING[model_type]
        try:
            config = kind()
        except StrictDataclassError:
            continue  # it is a part of another model, and has no sizes of its own
        if model_type != config.model_type:
            continue  # another name for a type that is there, too
        if any(part is AutoConfig or part.model_type for part in kind.sub_configs.values()):
            continue  # a model around others
        if config.is_encoder_decoder or (hasattr(config, "is_decoder") and sees_ahead(model_type)):
            continue  # made to see all of a text, and a decoder only when it is told to be one
        if not is_mixture(model_type):
            yield model_type


def is_mixture(model_type: str) -> bool:
    """Whether a model has experts, and something else in their place where it is given none."""
    kind = CONFIG_MAPPING[model_type]
    classes = vars(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[kind].__module__])
    if not any(name.endswith(EXPERTS) for name in classes):
        return False
    known = {*kind().to_dict(), *kind.attribute_map}
    for sizes in ({key: value for key, value in SIZES.items() if key in known}, {}):
        try:
            return is_mixture_of(model_type, sizes)
        except UNMADE:
            continue
    return True


def is_mixture_of(model_type: str, sizes: Mapping[str, Any]) -> bool:
    """The same of certain sizes; one of UNMADE where there is no such model."""
    config = CONFIG_MAPPING[model_type](**sizes)
    if "moe" in (getattr(config, "layer_types", None) or ()):
        return False  # experts are layers of their own, which need not be there
    none = {key: 0 for key, held in config.to_dict().items() if key.endswith("experts") and held}
    try:
        left = on_meta(model_type, {**sizes, **none})
    except UNMADE:
        left = None
    if left is not None and has_experts(left):
        return True
    whole = on_meta(model_type, sizes)
    stays = left is not None and {*left.state_dict()} < {*whole.state_dict()}
    return has_experts(whole) and not stays


def on_meta(model_type: str, sizes: Mapping[str, Any]) -> Any:  # noqa: ANN401
    return made(CONFIG_MAPPING[model_type](**sizes), "meta")


def has_experts(model: nn.Module) -> bool:
    return any(type(module).__name__.endswith(EXPERTS) for module in model.modules())


def sees_ahead(model_type: str) -> bool:
    """Whether what is predicted of a token hangs on those behind it, as in encoders."""
    ids = torch.arange(2, 10)[None]
    changed = torch.cat((ids[:, :4], ids[:, :4]), dim=1)
    try:
        model = tiny(model_type, pad_token_id=0)
    except UntoldError:
        return False  # a person will see
    try:
        with torch.no_grad():
            first, other = (model(given).logits[:, :4] for given in (ids, changed))
    except UNMADE:
        return True  # it wants to be told more than a text
    return not torch.equal(first, other)


if __name__ == "__main__":
    main()

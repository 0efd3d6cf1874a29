"""The code that ships with a converted model for which transformers has no MoE class.

It is the text of `modeling_upcycled.py`, with imports of the three classes of the dense family. The
module is read as text, since importing it needs torch and transformers.
"""

from __future__ import annotations

import re
from importlib.resources import files

CODE_NAME = "modeling_upcycled.py"
ARCHITECTURE = "UpcycledForCausalLM"
WRAPPED_ARCHITECTURE = "UpcycledForConditionalGeneration"
UPCYCLED_PREFIX = "upcycled_"
"""The prefix of model types with shipped code; the dense model type follows."""


def auto_map(*, wrapped: bool) -> dict[str, str]:
    """Return the config's `auto_map`; `wrapped` says whether the text model is in a wrapper."""
    whole = WRAPPED_ARCHITECTURE if wrapped else ARCHITECTURE
    return {
        "AutoConfig": "modeling_upcycled.UpcycledConfig",
        # Engines build the base model, not the causal LM.
        "AutoModel": "modeling_upcycled.UpcycledModel",
        f"AutoModelFor{'ImageTextToText' if wrapped else 'CausalLM'}": f"modeling_upcycled.{whole}",
    }


def modeling_code(classes: tuple[str, str, str], *, text_model: str | None = None) -> str:
    """Return the text of a model's `modeling_upcycled.py`.

    `classes` are the config, base model and full model that transformers exports for the dense
    family, or for its wrapper, whose base model calls the text model `text_model`.
    """
    text, whole = files(__package__).joinpath(CODE_NAME).read_text(encoding="utf-8"), "ForCausalLM"
    if text_model is not None:
        text, whole = text.replace(whole, wrapped := "ForConditionalGeneration"), wrapped
        text = text.replace('"language_model"', f'"{text_model}"')
    for role, name in zip(("Config", "Model", whole), classes, strict=True):
        text = re.sub(rf"import \w+ as Dense{role}\n", f"import {name} as Dense{role}\n", text)
    return text

"""The code that lies inside a converted model for which transformers has no class.

`modeling_upcycled.py` is a module of this package and, but for the three classes of the dense
family that it imports, what is written into the model. It is read as text here, since importing it
takes torch and transformers.
"""

from __future__ import annotations

import re
from importlib.resources import files

CODE_NAME = "modeling_upcycled.py"
ARCHITECTURE = "UpcycledForCausalLM"
WRAPPED_ARCHITECTURE = "UpcycledForConditionalGeneration"
UPCYCLED_PREFIX = "upcycled_"
"""How the model type begins; that of the dense family follows."""

_ROLES = ("DenseConfig", "DenseModel", "DenseForCausalLM")


def auto_map(*, wrapped: bool) -> dict[str, str]:
    """Return what a config says of the code; `wrapped` of a model that has a text model inside."""
    name, whole = (
        ("ImageTextToText", WRAPPED_ARCHITECTURE) if wrapped else ("CausalLM", ARCHITECTURE)
    )
    return {
        "AutoConfig": "modeling_upcycled.UpcycledConfig",
        # Engines build the base model, not the causal LM.
        "AutoModel": "modeling_upcycled.UpcycledModel",
        f"AutoModelFor{name}": f"modeling_upcycled.{whole}",
    }


def modeling_code(classes: tuple[str, str, str], *, wrapped: bool = False) -> str:
    """Return the text of a model's `modeling_upcycled.py`.

    `classes` are the dense family's config, base model and causal LM, as transformers exports them,
    or of a model that has a text model inside its own three.
    """
    text = files(__package__).joinpath(CODE_NAME).read_text(encoding="utf-8")
    for role, name in zip(_ROLES, classes, strict=True):
        text, count = re.subn(
            rf"^from transformers import \w+ as {role}$",
            f"from transformers import {name} as {role}",
            text,
            flags=re.MULTILINE,
        )
        assert count == 1, f"{CODE_NAME} imports {count} classes as {role}"
    return text.replace("ForCausalLM", "ForConditionalGeneration") if wrapped else text

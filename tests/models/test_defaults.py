"""`defaults.json` against transformers; tests/models/test_dense.py holds its shapes to models."""

from __future__ import annotations

import json
from typing import Any

import pytest
from family_defaults import MOE, TARGET, config_class, formatted, generated, installed

from upcycle_cli.models import dense_rows as families
from upcycle_cli.models.defaults import defaults_of
from upcycle_cli.models.moe_rows import NATIVE

FILE: dict[str, Any] = json.loads(TARGET.read_text("utf-8"))
DENSE = tuple(FILE["tensors"])
TYPES = tuple(FILE["defaults"])

pytestmark = pytest.mark.skipif(
    installed() != FILE["transformers"],
    reason=f"defaults.json is of transformers {FILE['transformers']}, not of {installed()}",
)


def test_rows_with_native_targets_have_defaults() -> None:
    for row in families.DENSE.values():
        targets = {*row.targets} & {*NATIVE}
        assert not targets or row.model_type in TYPES
        if any(NATIVE[target].unsupported_tensors for target in targets):
            assert row.model_type in DENSE


@pytest.mark.parametrize("model_type", sorted(TYPES))
def test_an_absent_key_means_its_default(model_type: str) -> None:
    listed, config = defaults_of(model_type), config_class(model_type)()
    rope = getattr(config, "rope_parameters", None) or {}
    for key in ("rope_theta", "partial_rotary_factor") if "rope_theta" in listed else ():
        assert rope.get(key) == listed.get(key)
    read = json.loads(config.to_json_string(use_diff=False)) | rope
    # A null is derived, and so is the window of a model that does not slide.
    derived = {"sliding_window"} if "use_sliding_window" in listed else set()
    derived |= config.attribute_map.keys()  # saved by their other names
    for key, value in listed.items():
        if value not in (None, "auto", -1) and key not in derived:
            found = read.get(key, False)  # muse_glimmer never ties its head
            by_layer = isinstance(found, list) and not isinstance(value, list)
            assert found == ([value] * len(found) if by_layer else value), key


def test_the_file_is_what_transformers_says() -> None:
    fresh = generated([name for name in TYPES if name not in MOE or name in DENSE])
    assert fresh == FILE
    assert TARGET.read_text("utf-8") == formatted(fresh), "python tests/family_defaults.py --write"

"""The attention of released models is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from interop.conclusions import parts_of, target_of  # noqa: E402
from interop.conversions import documented  # noqa: E402

from upcycle_cli.models.dense import read_dense  # noqa: E402
from upcycle_cli.models.engines import attention_part  # noqa: E402
from upcycle_cli.models.lookup import dense_family  # noqa: E402
from upcycle_cli.models.overview import becomes  # noqa: E402


def test_the_default_targets_of_released_text_models_are_measured() -> None:
    rows = {(target_of(case), parts_of(case)[-1]) for case in documented() if not case.control}
    models = json.loads((HERE.parent / "fixtures" / "named_models.json").read_text("utf-8"))
    missing = set()
    for name, config in models.items():
        family = dense_family(config)
        if family.inside is not None:
            continue
        able = becomes(config, [*read_dense(family, config).shapes])
        first = next(facts for facts in able if facts.refusal is None)
        title = f"upcycled_{config['model_type']}" if first.name == "upcycled" else first.name
        if (title, attention_part(first.attention)) not in rows:
            missing.add(name)
    assert missing == set()

"""What the rows of results.json say of targets: what upcycle knows of engines and trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from interop.conversions import UPCYCLED, Case, documented, has_scale, is_fused
from interop.models import settings_of
from interop.results import cell_of
from interop.wrapped import WRAPPED
from upcycle_cli.models import engines as known
from upcycle_cli.models.attention import PLAIN, attention_class
from upcycle_cli.models.engines import DIFFERS, FAILS, SAME
from upcycle_cli.models.lookup import choose
from upcycle_cli.models.moe_config import moe_text_config
from upcycle_cli.models.shipped import UPCYCLED_PREFIX
from upcycle_cli.models.wrappers import WRAPPERS

UNTIED = "--untie-embeddings"
Measured = dict[str, dict[str, dict[str, str]]]
"""By target, software, and what a model has: its routing, fused experts, its attention, …"""

NOT_OF_THE_MODEL = {
    ("nemotron_h", "vLLM"): "its build for CPUs has no experts without a gate",
    ("qwen3_5_moe_text", "vLLM"): "its build for CPUs has this attention in bfloat16 only",
    ("qwen3_5_moe around qwen3_5_moe_text", "vLLM"): "likewise",
    ("ernie4_5_moe", "llama.cpp"): "its converter wants the type's own tokenizer",
    ("solar_open", "llama.cpp"): "its converter wants the type's own tokenizer",
    ("gemma4_text", "llama.cpp"): "its converter wants the type's own tokenizer",
    ("gemma4 around gemma4_text", "llama.cpp"): "its converter wants the type's own tokenizer",
    ("ernie4_5_moe", "NeMo AutoModel"): "it wants a tied head, which this tiny model has not",
    ("deepseek_v3", "NeMo AutoModel"): "its own class wants CUDA",
    ("nemotron_h", "NeMo AutoModel"): "its own class wants mamba_ssm, which is built for CUDA",
}
"""Failures of this set-up that other machines or models may not have: upcycle lists none."""
ON_CPU = {
    ("deepseek_v3", "vLLM"): "its build for CPUs computes another attention, of any DeepSeek-V3",
}
"""Wrong results on a CPU: upcycle warns of them, because the engine does not."""


@dataclass(frozen=True)
class Row:
    """What one software made of one conversion."""

    case: Case
    software: str
    verdict: str

    @property
    def target(self) -> str:
        """What comes out, as upcycle calls it; all shipped code is one to a trainer."""
        if self.software in known.TRAINERS and self.case.target == UPCYCLED:
            return known.ALL_SHIPPED
        return target_of(self.case)

    @property
    def parts(self) -> tuple[str, ...]:
        """What the conversion has that a software may not support; its routing comes first."""
        return parts_of(self.case)

    def is_refuted_by(self, other: Row) -> bool:
        """Whether another dense type became the same kind of model, and failed."""
        if (other.target, other.software) != (self.target, self.software):
            return False
        others = other.case.dense_type != self.case.dense_type
        return others and {*other.parts} <= {*self.parts}


def all_rows() -> list[Row]:
    """Return the results that say something of a target, so none that is wrong on purpose.

    An engine may ignore a setting of a dense type and of the target alike, and so make the same of
    both. Where another dense type shows that it does, that result does not count.
    """
    rows = [
        Row(case, software, cell_of(text).verdict)
        for case, found in documented().items()
        for software, text in found.items()
        if software != "transformers 5" and not case.control  # it runs everything
    ]
    failed = [row for row in rows if row.verdict != SAME]
    return [row for row in rows if row.verdict != SAME or not any(map(row.is_refuted_by, failed))]


def measured(rows: Sequence[Row]) -> Measured:
    """Return what `models/knowledge/engines.json` says; ValueError where it cannot say it."""
    result: Measured = {}
    # Successes come first: what a successful model has cannot be why another one fails.
    for row in sorted(rows, key=_order):
        found = result.setdefault(row.target, {}).setdefault(row.software, {})
        # Of the others a failure is not said, and it may be one family's alone.
        unsaid = row.software in known.OTHERS and row.verdict == FAILS
        if not unsaid and (row.target, row.software) not in NOT_OF_THE_MODEL:
            _take(found, row)
    _refuse_contradictions(result, rows)
    for software in known.OTHERS:
        for target in result.values():
            if DIFFERS not in target.get(software, {}).values():
                target.pop(software, None)
    said = {
        target: {name: _said(target, name, parts) for name, parts in found.items()}
        for target, found in result.items()
    }
    _say_once(said)
    return said


def _refuse_contradictions(said: Measured, rows: Sequence[Row]) -> None:
    wrong = [
        f"{row.software}, {row.case.name}: same, and {verdict} in another row with {part}"
        for row in rows
        for part, verdict in said[row.target].get(row.software, {}).items()
        if row.verdict == SAME != verdict and {*part.split(known.TOGETHER)} <= {*row.parts}
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def _order(row: Row) -> tuple[bool, int, int]:
    *parts, attention = row.parts
    properties = attention.count(",") + (attention != known.attention_part(PLAIN))
    return row.verdict != SAME, properties, len(parts)


def _say_once(said: Measured) -> None:
    """Say of engines that refuse all shipped code that they do, in place of each family."""
    shipped = [found for target, found in said.items() if target.startswith(UPCYCLED_PREFIX)]
    for software in known.ENGINES:
        every = [found[software] for found in shipped if software in found]
        if {verdict for parts in every for verdict in parts.values()} == {FAILS}:
            common = {part: FAILS for parts in every for part in parts}
            said.setdefault(known.ALL_SHIPPED, {})[software] = common
            for found in shipped:
                found.pop(software, None)


def _said(target: str, software: str, parts: Mapping[str, str]) -> dict[str, str]:
    differs = known.DIFFERS_ON_CPU if (target, software) in ON_CPU else DIFFERS
    words = {DIFFERS: known.CHANGED if software == "mergekit" else differs}
    return {part: words.get(verdict, verdict) for part, verdict in parts.items()}


def target_of(case: Case) -> str:
    """Return what comes out, as upcycle calls it."""
    if case.target == UPCYCLED:
        return f"{UPCYCLED_PREFIX}{case.dense_type}"
    if not case.wrapper:
        return case.target
    return f"{WRAPPERS[case.wrapper].native} around {case.target}"


def dense_config(dense: str) -> dict[str, Any]:
    """Return what the config of a dense model says, without its tokens."""
    model_type, *_ = dense.split(maxsplit=1)
    if dense in WRAPPED:
        row = WRAPPED[dense]
        inner = {"text_config": dict(row.text), "vision_config": dict(row.sees)}
        return {"model_type": model_type, **row.around, **inner}
    return {"model_type": model_type, **settings_of(dense)}


@cache
def parts_of(case: Case) -> tuple[str, ...]:
    """Return what a conversion has that software may not support, from routing to attention."""
    config = dense_config(case.dense)
    family = choose(config, case.target, None)
    tied = family.dense.values.get("tie_word_embeddings") and UNTIED not in case.options
    options = {"--expert-layout fused": known.FUSED, "--layers 1": known.SOME_LAYERS}
    parts = [options[option] for option in case.options if option in options]
    parts += [known.FUSED] if is_fused(case.target) else []
    in_config = has_scale(case.target) and "--scale-split balanced" not in case.options
    parts += [known.SCALED] if in_config else []
    parts += [known.SHARED for option in case.options if option.startswith("--shared-experts")]
    parts += [known.TIED] if tied else []
    attention = attention_class(moe_text_config(config, family))
    return (case.routing, *parts, known.attention_part(attention))


def _take(found: dict[str, str], row: Row) -> None:
    """Note that all parts are supported, or which of them is not: the first, or all together."""
    if row.verdict == SAME:
        found.update(dict.fromkeys(row.parts, SAME))
        return
    known_as = {found[part] for part in row.parts if found.get(part, SAME) != SAME}
    if {row.verdict, DIFFERS} & known_as:
        return
    suspects = [part for part in row.parts if part not in found]
    found[suspects[0] if suspects else known.TOGETHER.join(row.parts)] = row.verdict

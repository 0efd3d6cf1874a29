"""What came out, what upcycle says of it, and the table of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from markdown_table import header, row

from interop.conversions import UPCYCLED, Case, has_scale, is_fused
from interop.models import is_tied
from upcycle_cli.models import engines as known
from upcycle_cli.models.engines import DIFFERS, FAILS, SAME, Engine, Support, Trainer
from upcycle_cli.models.shipped import UPCYCLED_PREFIX
from upcycle_cli.models.wrappers import WRAPPERS

Output = Sequence[Sequence[float]]
"""Token ids of each continuation; or scores; or names of tensors that are wrong."""

NOT_TRIED = "–"
SCORE_TOLERANCE = 1e-3  # rounding, in float32
HESITATION = 0.1
"""A hundred times the router's logits: what softmax-topk can move between two tokens, in nats."""
ENOUGH_TOKENS = 24

Margin = Callable[[int, int], float]
"""By how many nats the dense model prefers a token (its text, its position) to the next best."""


@dataclass(frozen=True)
class Cell:
    """What one software made of one conversion."""

    verdict: str
    detail: str = ""


def compare(found: Output, expected: Output, margin: Margin | None = None) -> Cell:
    """Return whether two outputs are the same, and where they part.

    With approximate routing, which `margin` is for, texts may part at a token where the dense model
    itself hesitates, after enough that agree; and scores may be off by as much on average: a rare
    token at which two groups tie moves its own by more.
    """
    agreeing = 0
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if len(one) != len(other):
            return Cell(DIFFERS, f"{len(one)} items for {len(other)} in output {index}")
        if margin and _are_scores(other):
            off = fmean(abs(a - b) for a, b in zip(one, other, strict=True))
            if not off < HESITATION:
                return Cell(DIFFERS, f"output {index} is off by {off:.3g} on average")
            continue
        for position, (a, b) in enumerate(zip(one, other, strict=True)):
            if not _equal(a, b):
                if margin and abs(margin(index, position)) < HESITATION:
                    break
                return Cell(DIFFERS, f"from item {position} of output {index}: {a} for {b}")
            agreeing += 1
    if agreeing < min(ENOUGH_TOKENS, sum(len(text) for text in expected if not _are_scores(text))):
        return Cell(DIFFERS, f"only {agreeing} items before the outputs part")
    return Cell(SAME)


def _are_scores(output: Sequence[float]) -> bool:
    return any(isinstance(item, float) for item in output)


def _equal(one: float, other: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=0, abs_tol=SCORE_TOLERANCE)
    return one == other


def contradiction(
    case: Case,
    software: str,
    cell: Cell,
    said: Iterable[Engine | Trainer],
    *,
    lists_all: bool = False,
) -> str | None:
    """Return how what was found contradicts what upcycle says, or that a control went unnoticed.

    With `lists_all` it says of each software that it does not list that it does not run.
    """
    where = f"{software}, {case.name}"
    if cell.verdict == NOT_TRIED:
        return None
    if case.control:
        # An engine that cannot load it, or is known to be wrong, proves nothing.
        return f"{where}: not told from the dense model" if cell.verdict == SAME else None
    listed = {each.name: each.support for each in said}
    support = listed.get(software, listed.get(software.rstrip(" 45")))  # any transformers
    if (support is Support.RUNS) == (cell.verdict == SAME) or not (support or lists_all):
        return None
    return f"{where}: upcycle says '{support}', found: {cell.verdict} {cell.detail}"


def table(rows: Mapping[Case, Mapping[str, Cell]], software: Sequence[str]) -> str:
    """Return the Markdown table, and below it why something failed."""
    lines, details = [header("conversion", *software)], dict[str, list[str]]()
    for case, cells in rows.items():
        lines.append(row(case.name, *(cells.get(s, Cell(NOT_TRIED)).verdict for s in software)))
        for name in software:
            if name in cells and cells[name].verdict == FAILS:
                details.setdefault(f"{name}: {cells[name].detail}", []).append(case.name)
    reasons = [f"- {reason} ({'; '.join(names)})" for reason, names in details.items()]
    return "\n".join([*lines, "", *reasons]).rstrip()


Verdicts = Mapping[Case, Mapping[str, str]]
"""The table: the verdict of each software on each conversion."""
Measured = dict[str, dict[str, dict[str, str]]]
"""By target, engine, and what a model has: its routing, fused experts, a tied head, …"""

NOT_OF_THE_MODEL = {
    ("nemotron_h", "vLLM"): "its build for CPUs has no experts without a gate",
    ("qwen3_5_moe_text", "vLLM"): "its build for CPUs has this attention in bfloat16 only",
    ("qwen3_5_moe around qwen3_5_moe_text", "vLLM"): "likewise",
    ("ernie4_5_moe", "llama.cpp"): "its converter wants the type's own tokenizer",
    ("solar_open", "llama.cpp"): "its converter wants the type's own tokenizer",
    ("gemma4_text", "llama.cpp"): "its converter wants the type's own tokenizer",
    ("gemma4 around gemma4_text", "llama.cpp"): "its converter wants the type's own tokenizer",
}
"""Failures of this set-up that other machines or models may not have: upcycle lists none."""
ON_CPU = {
    ("deepseek_v3", "vLLM"): "its build for CPUs computes another attention, of any DeepSeek-V3",
}
"""Wrong results on a CPU: upcycle warns of them, because the engine does not."""


def measured(verdicts: Verdicts) -> Measured:
    """Return what `models/knowledge/engines.json` says; ValueError where it cannot say it."""
    found: dict[tuple[str, str, str], str] = {}
    plain = {case: cells for case, cells in verdicts.items() if not case.control}
    # A model with fewer parts tells what each part does.
    for case, cells in sorted(plain.items(), key=lambda item: len(parts_of(item[0]))):
        for engine in (*known.ENGINES, *known.OTHERS):
            verdict = cells.get(engine, NOT_TRIED)
            # Of the others a failure is not said, and it may be one family's alone.
            nothing = (NOT_TRIED, FAILS) if engine in known.OTHERS else (NOT_TRIED,)
            if verdict not in nothing and (target_of(case), engine) not in NOT_OF_THE_MODEL:
                _take(found, target_of(case), engine, parts_of(case), verdict)
    result: Measured = {}
    for (target, engine, part), verdict in found.items():
        if engine not in known.OTHERS or verdict == DIFFERS:
            said = _said(target, engine, verdict)
            result.setdefault(target, {}).setdefault(engine, {})[part] = said
    shipped = [value for target, value in result.items() if target.startswith(UPCYCLED_PREFIX)]
    for engine in known.ENGINES:
        every = {verdict for value in shipped for verdict in value.get(engine, {}).values()}
        if every == {FAILS}:
            common = {part: FAILS for value in shipped for part in value.get(engine, {})}
            result.setdefault(known.ALL_SHIPPED, {})[engine] = common
            for value in shipped:
                value.pop(engine, None)
    return result


def _said(target: str, engine: str, verdict: str) -> str:
    if verdict != DIFFERS:
        return verdict
    if engine == "mergekit":
        return known.CHANGED
    return known.DIFFERS_ON_CPU if (target, engine) in ON_CPU else DIFFERS


def target_of(case: Case) -> str:
    """Return what comes out, as upcycle calls it."""
    if case.target == UPCYCLED:
        return f"{UPCYCLED_PREFIX}{case.wrapper or case.dense}"
    if not case.wrapper:
        return case.target
    return f"{WRAPPERS[case.wrapper].natives[case.target][0]} around {case.target}"


def parts_of(case: Case) -> list[str]:
    """Return what a conversion has that an engine may not understand; its routing comes first."""
    tied = is_tied(case.dense) and "--untie-embeddings" not in case.options
    options = {"--expert-layout fused": known.FUSED, "--layers 1": known.SOME_LAYERS}
    parts = [options[option] for option in case.options if option in options]
    parts += [known.FUSED] if is_fused(case.target) else []
    in_config = has_scale(case.target) and "--scale-split balanced" not in case.options
    parts += [known.SCALED] if in_config else []
    parts += [known.SHARED for option in case.options if option.startswith("--shared-experts")]
    return [case.routing, *parts, *([known.TIED] if tied else [])]


def _take(
    found: dict[tuple[str, str, str], str],
    target: str,
    engine: str,
    parts: Sequence[str],
    verdict: str,
) -> None:
    """Note that all parts are understood, or the first that nothing else shows to be."""
    before = [found.get((target, engine, part)) for part in parts]
    wrong = [each for each in before if each not in (None, SAME)]
    suspects = [part for part, each in zip(parts, before, strict=True) if each is None]
    if verdict != SAME and wrong:
        return
    if wrong or (verdict != SAME and not suspects):
        raise ValueError(f"{engine}, {target}, {', '.join(parts)}: {verdict}, against other rows")
    for part in suspects if verdict == SAME else suspects[:1]:
        found[target, engine, part] = verdict

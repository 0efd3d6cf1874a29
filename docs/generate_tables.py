# ruff: noqa: E402
"""Write tables of the documentation from what upcycle knows, and from what was measured.

    python docs/generate_tables.py

A table lies between two comments of its page, `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "interoperability"), str(TESTS), str(TESTS.parent)]

from interop.conversions import documented, results
from interop.results import cell_of
from interop.results import table as table_of_results

from upcycle_cli.models import engines as software
from upcycle_cli.models.attention import PLAIN
from upcycle_cli.models.defaults import table
from upcycle_cli.models.dense import read_dense
from upcycle_cli.models.dense_rows import DENSE
from upcycle_cli.models.engines import (
    DIFFERS,
    FAILS,
    FUSED,
    SAME,
    SCALED,
    SILENTLY_WRONG,
    TIED,
    TRAINERS,
    Support,
    Traits,
    attention_part,
    trainers,
    usual_attention,
)
from upcycle_cli.models.lookup import dense_family, native_target, shipped_target
from upcycle_cli.models.moe import Target
from upcycle_cli.models.moe_rows import NATIVE
from upcycle_cli.models.overview import TargetFacts, becomes, families
from upcycle_cli.models.shipped import UPCYCLED_PREFIX
from upcycle_cli.models.wrappers import WRAPPERS, Inside
from upcycle_cli.recipe.recipe import SHIPPED, ExpertLayout

FOLDER = Path(__file__).parent
PAGES = (
    *("reference/families.md", "reference/compatibility.md"),
    *("evidence/engines.md", "evidence/training.md", "evidence/models.md"),
)
_TABLE = re.compile(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", re.DOTALL)
_ENGINES = ("transformers 4", "vLLM", "llama.cpp", "MLX")
_UNTESTED = "–"
_USUAL_TRAINERS = "transformers, TRL, peft"
_OTHER_TRAINERS = "NeMo AutoModel, torchtitan, OLMo-core, Megatron-Bridge"
_WORDS = {
    Support.RUNS: "yes",
    Support.REFUSES: "no",
    Support.WRONG: "wrong",
    Support.WRONG_ON_CPU: "wrong on CPU",
    Support.UNTIED_ONLY: "untied",
    Support.UNTIED_OR_WRONG: "untied, or wrong",
    Support.BALANCED_OR_WRONG: "`--scale-split balanced`, or wrong",
    Support.PER_EXPERT_ONLY: "per-expert",
}
NAMED_MODELS = FOLDER.parent / "tests/fixtures/named_models.json"
_ANSWERS: Mapping[str, Collection[Support]] = {
    "computes the same": {Support.RUNS},
    "needs an option": {each for each in Support if "--" in each},
    "computes something else": SILENTLY_WRONG - {each for each in Support if "--" in each},
    "does not load it": {Support.REFUSES},
    "by its source, not run": {Support.LOADS_BY_SOURCE},
    "not tried": {Support.NOT_TRIED},
}


def page(name: str) -> str:
    """Return a page with its tables as they should be."""
    text = (FOLDER / name).read_text(encoding="utf-8")

    def renewed(found: re.Match[str]) -> str:
        return "\n".join([found[1], *_TABLES[found[2]](), found[3]])

    return _TABLE.sub(renewed, text)


def _dense() -> Iterator[str]:
    yield from _header("dense model type", "targets (default first)")
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, targets in families().dense.items():
        alike.setdefault(targets, []).append(name)
    for targets, names in sorted(alike.items(), key=lambda item: item[1]):
        yield _row(", ".join(names), ", ".join(targets))


def _wrappers() -> Iterator[str]:
    yield from _header("text model (if it has another name): models", "targets (default first)")
    alike: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for wrapper, texts in families().wrappers.items():
        for targets in dict.fromkeys(texts.values()):
            held = [text for text, found in texts.items() if found == targets]
            shown = "" if held == [f"{wrapper}_text"] else f"{', '.join(held)}: "
            alike.setdefault(targets, {}).setdefault(shown, []).append(wrapper)
    for targets, models in alike.items():
        named = (text + ", ".join(names) for text, names in sorted(models.items()))
        yield _row("; ".join(named), ", ".join(targets))


def _targets() -> Iterator[str]:
    yield from _header("target", "routings (default first)", "MoE layers", "shared experts")
    for target in families().targets:
        yield _row(target.name, ", ".join(target.routings), target.layers, target.shared_experts)


def _software() -> Iterator[str]:
    usual, others = (names.split(", ") for names in (_USUAL_TRAINERS, _OTHER_TRAINERS))
    columns = (*_ENGINES, _USUAL_TRAINERS, "other trainers", "balancing loss")
    yield from _header("target", *columns)
    inside = [
        native_target(name, Inside(wrapper))
        for wrapper in WRAPPERS.values()
        for name in wrapper.natives
    ]
    shipped = shipped_target(DENSE["olmo2"], "silu", biased=False)
    alike: dict[tuple[str, ...], list[str]] = {}
    for target in (*NATIVE.values(), *inside, shipped):
        kind = SHIPPED if target.ships_code else target.title
        if kind not in table("engines")["targets"]:
            continue
        runs = [_engine(target, engine) for engine in _ENGINES]
        trains = {name: _trainer(target, name) for name in (*usual, *others)}
        more = (f"{name} ({trains[name]})" for name in others if trains[name] != _UNTESTED)
        if not any(trains[name] != _UNTESTED for name in usual):
            continue  # inspect and docs/evidence/models.md have what is known of it
        each = dict.fromkeys(trains[name] for name in usual)
        loss = "yes" if target.has_balancing_loss else "no"
        outer, _, inner = target.title.rpartition(" around ")
        name = SHIPPED if target.ships_code else f"{inner} in {outer}" if outer else inner
        cells = (*runs, " or ".join(each), ", ".join(more), loss)
        alike.setdefault(cells, []).append(name)
    for cells, names in alike.items():
        yield _row(", ".join(names), *cells)


def _engine(target: Target, name: str) -> str:
    """Return what an engine makes of a target as convert writes it, by routing if they differ."""
    if target.ships_code and (tried := [own for own in _shipped() if name in own]):
        runs = sum({*own[name].values()} == {SAME} for own in tried)
        return f"{runs} of {len(tried)} model types"
    return _words(target, name, engines=True)


def _trainer(target: Target, name: str) -> str:
    """Return what a trainer makes of a target as convert writes it."""
    return _words(target, name, engines=False)


def _words(target: Target, name: str, *, engines: bool) -> str:
    kind = SHIPPED if target.ships_code else target.title
    known = table("engines")["targets"].get(kind, {}).get(name)
    if not known:
        return _UNTESTED
    usual = [SCALED] * (target.keys.scale is not None)
    usual += [FUSED] * (target.layout(None) is ExpertLayout.FUSED)
    able = [part for part in _all_classes() if known.get(part) == SAME]
    usual_class = usual_attention(target)
    attention = able[0].removeprefix(attention_part("")) if able else usual_class
    words = {}
    for routing in target.routings:
        for properties in (usual, [*usual, TIED]):
            traits = Traits(routing, properties, attention)
            every = software.engines(target.title, traits) if engines else trainers(target, traits)
            support = {each.name: each.support for each in every}.get(name, Support.RUNS)
            if support is not Support.NOT_TRIED:
                words[routing] = _WORDS[support]
            if support is not Support.RUNS:
                break
    said = ", ".join(f"{routing} {word}" for routing, word in words.items())
    if len({*words.values()}) == 1:
        said = next(iter(words.values()))
    return said


def _all_classes() -> list[str]:
    """Return all attention classes that were measured; plain first, then the simple ones."""
    every = table("engines")["targets"].values()
    found = {part for each in every for known in each.values() for part in known}
    classes = (part for part in found if part.startswith(attention_part("")))
    return sorted(classes, key=lambda part: (part != attention_part(PLAIN), part.count(","), part))


def _attention() -> Iterator[str]:
    """Yield what was measured of each target with each attention class."""
    verdicts = {SAME: "same", DIFFERS: "differs", FAILS: "refuses"}
    yield from _header("target", "attention", *verdicts.values())
    for target, known in table("engines")["targets"].items():
        for part in _all_classes():
            cells = [
                ", ".join(name for name, found in known.items() if found.get(part) == verdict)
                for verdict in verdicts
            ]
            if any(cells):
                yield _row(target, part.removeprefix(attention_part("")), *cells)


def _shipped() -> Iterator[Mapping[str, Mapping[str, str]]]:
    """Yield the verdicts of engines on shipped code, for each dense model type."""
    targets = table("engines")["targets"].items()
    yield from (own for name, own in targets if name.startswith(UPCYCLED_PREFIX))


def _engines() -> Iterator[str]:
    return _measured(trainers=False)


def _trainers() -> Iterator[str]:
    return _measured(trainers=True)


def _measured(*, trainers: bool) -> Iterator[str]:
    """Yield versions, what engines or trainers made of each conversion, and why some refused."""
    names = {n: each for n, each in results()["software"].items() if (n in TRAINERS) == trainers}
    yield from _header("software", "version", "measured on")
    yield from (_row(name, each["version"], each["date"]) for name, each in names.items())
    yield ""
    rows = {
        case: {name: cell_of(text) for name, text in found.items()}
        for case, found in documented().items()
        if names.keys() & found.keys()
    }
    yield from table_of_results(rows, [*names]).splitlines()


def _named() -> Iterator[str]:
    """Yield what becomes of released models by name, those with the same answers in one row."""
    yield from _header("model", "target", "attention", *_ANSWERS)
    alike: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    models: dict[str, Any] = json.loads(NAMED_MODELS.read_text(encoding="utf-8"))
    for name, config in models.items():
        tensors = read_dense(dense_family(config), config).shapes
        rows = tuple(_answers(facts) for facts in becomes(config, [*tensors]))
        alike.setdefault(rows, []).append(name)
    for rows, names in alike.items():
        first = dict.fromkeys(rows[:1], ", ".join(names))
        yield from (_row(first.get(row, ""), *row) for row in rows)


def _answers(facts: TargetFacts) -> tuple[str, ...]:
    """Return a target, the attention of the model in it, and software by what it makes of it."""
    if facts.refusal is not None:
        return (facts.name, facts.refusal, *[""] * len(_ANSWERS))
    kinds = (
        ("", facts.engines, facts.other_engines),
        ("trainers: ", facts.trainers, facts.other_trainers),
    )
    cells = []
    for supports in _ANSWERS.values():
        said = []
        for label, able, others in kinds:
            names = [_with(name, routings, facts) for name, routings in able.items()]
            names = names * (Support.RUNS in supports)
            names += [_with_option(each) for each in others if each.support in supports]
            said += [label + ", ".join(names)] * bool(names)
        cells.append("; ".join(said))
    return (facts.name, facts.attention, *cells)


def _with(name: str, routings: Collection[str], facts: TargetFacts) -> str:
    """Return a software that runs a target, with the routing if it is not the default."""
    return name if facts.routings[0] in routings else f"{name} ({', '.join(routings)})"


def _with_option(each: software.Engine) -> str:
    """Return a software with the option that it needs, if any."""
    _, dashes, option = each.support.partition("--")
    return f"{each.name} (`{dashes}{option}`)" if option else each.name


def _header(*names: str) -> tuple[str, str]:
    return _row(*names), f"|{'---|' * len(names)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


_TABLES = {"dense": _dense, "wrappers": _wrappers, "targets": _targets, "software": _software}
_TABLES |= {"engines": _engines, "trainers": _trainers, "named": _named}
_TABLES["attention"] = _attention


if __name__ == "__main__":
    for each in PAGES:
        (FOLDER / each).write_text(page(each), encoding="utf-8")

"""Which inference engines run a target and routing as it is meant.

Facts about other software, each found by running upcycled models in it: `measured.json` is made of
the table of docs/interoperability.md, which says why, and which tests/interoperability/run.py
printed. What engines get wrong in silence is listed there: llama.cpp and MLX ignore
`norm_topk_prob`, vLLM a tied head of glm4_moe, llama.cpp the scaling factor of lfm2_moe. What was
not run is not said. Of shipped code each family stands for itself; that an engine
refuses all that were tried goes for every family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from upcycle_cli.models.defaults import table
from upcycle_cli.models.shipped import UPCYCLED_PREFIX
from upcycle_cli.recipe.recipe import Routing


class Support(StrEnum):
    """What happens when an engine loads the model."""

    RUNS = "runs"
    PER_EXPERT_ONLY = "needs --expert-layout per-expert"
    PER_EXPERT_OR_WRONG = "computes something else without --expert-layout per-expert"
    UNTIED_ONLY = "needs --untie-embeddings"
    UNTIED_OR_WRONG = "computes something else without --untie-embeddings"
    BALANCED_OR_WRONG = "computes something else without --scale-split balanced"
    WRONG = "loads, computes something else"
    WRONG_ON_CPU = "loads, computes something else on a CPU"
    CHANGES = "gives back other tensors"
    REFUSES = "does not load it"


@dataclass(frozen=True)
class Engine:
    """An engine's verdict on one model."""

    name: str
    support: Support


ENGINES = ("transformers 4", "vLLM", "llama.cpp", "MLX")
"""In the order in which they are listed, after transformers itself."""
OTHERS = ("vLLM by transformers", "lm-eval", "mergekit")
"""What runs models in another engine's way, or runs none: listed only where it goes wrong."""
SAME, DIFFERS, FAILS = "same", "differs", "fails"
"""What the table says of a model in an engine: the dense model's text, another, or none."""
DIFFERS_ON_CPU, CHANGED = "differs on a CPU", "changed"
"""What is made of the second where the engine does so with any such model, or runs none."""
FUSED, TIED, SOME_LAYERS = "fused", "tied", "some layers"
SCALED, SHARED = "scaled", "shared"
"""What a model can have beside its routing that an engine may not understand: the experts of a
layer in one tensor, a head that is the embedding, layers that keep their dense MLP, a factor on
gates in the config, a shared expert that computes something."""
ALL_SHIPPED = UPCYCLED_PREFIX.rstrip("_")
"""Stands for every model type whose code comes with the model."""
_MEANS: Mapping[tuple[str, str], Support] = {
    (FUSED, FAILS): Support.PER_EXPERT_ONLY,
    (FUSED, DIFFERS): Support.PER_EXPERT_OR_WRONG,
    (TIED, FAILS): Support.UNTIED_ONLY,
    (TIED, DIFFERS): Support.UNTIED_OR_WRONG,
    (SCALED, DIFFERS): Support.BALANCED_OR_WRONG,
}
_OTHERWISE: Mapping[str, Support] = {
    SAME: Support.RUNS,
    DIFFERS: Support.WRONG,
    DIFFERS_ON_CPU: Support.WRONG_ON_CPU,
    CHANGED: Support.CHANGES,
    FAILS: Support.REFUSES,
}


def engines(
    target: str,
    routing: Routing,
    *,
    tied: bool,
    fused: bool,
    plain_attention: bool,
    every_layer: bool = True,
    scaled: bool = False,
    shared: bool = False,
) -> tuple[Engine, ...]:
    """Return what is known of each engine; one that is not listed was not tried.

    `tied` says whether the head shares the embedding, `fused` whether the experts of a layer are
    one tensor. With `plain_attention` the heads make up the hidden size, no layer slides and rotary
    embeddings turn all of a head, not stretched: that anything else runs, only transformers showed.
    `every_layer` says that no dense MLP is left, `scaled` that c is in the config, `shared` that
    there is a shared expert that computes something. "transformers" is its version 5, which runs
    all; "transformers 4" is listed where it differs.
    """
    # Shipped code has one layout.
    fused = fused and not target.startswith(UPCYCLED_PREFIX)
    has = {
        SOME_LAYERS: not every_layer,
        str(routing): True,
        FUSED: fused,
        TIED: tied,
        SCALED: scaled,
        SHARED: shared,
    }
    parts = [part for part, applies in has.items() if applies]
    found = [Engine("transformers", Support.RUNS)]
    for name in (*ENGINES, *OTHERS):
        known = {TIED: SAME, **_verdicts(target, name)}
        met = [(part, known.get(part)) for part in parts]
        wrong = [
            _MEANS.get((part, verdict), _OTHERWISE[verdict])
            for part, verdict in met
            if verdict not in (SAME, None)
        ]
        listed = name != "transformers 4" and name not in OTHERS
        if wrong:  # with whatever attention
            found.append(Engine(name, wrong[0]))
        elif plain_attention and listed and all(verdict for _, verdict in met):
            found.append(Engine(name, Support.RUNS))
    return tuple(found)


def _verdicts(target: str, engine: str) -> Mapping[str, str]:
    """Return what was found, by routing and by what else a model can have."""
    every = ALL_SHIPPED if target.startswith(UPCYCLED_PREFIX) else target
    own, usual = (table("measured").get(name, {}).get(engine) for name in (target, every))
    found: Mapping[str, str] = own if own is not None else usual or {}
    return found


def support_lines(found: Iterable[tuple[str, Support]]) -> list[str]:
    """Return names of engines or trainers, a line for each kind of support."""
    lines: dict[Support, list[str]] = {}
    for name, support in found:
        lines.setdefault(support, []).append(name)
    return [
        ", ".join(names) + ("" if support is Support.RUNS else f": {support}")
        for support, names in lines.items()
    ]

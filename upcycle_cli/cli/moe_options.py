"""The options that say which MoE to make: declared once, for convert and inspect to take."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer  # noqa: TC002 - for readers; every command has imported it

from upcycle_cli.cli.option_sources import SIZES, is_given, source_of
from upcycle_cli.cli.shared_options import for_files, for_groups, for_recipe, for_weights
from upcycle_cli.core.errors import UpcycleError
from upcycle_cli.core.text import any_of
from upcycle_cli.recipe.recipe import (
    SHIPPED,
    ExpertLayout,
    NeuronOrder,
    Recipe,
    RouterInit,
    Routing,
    ScaleSplit,
    Scaling,
    parse_recipe_name,
)

if TYPE_CHECKING:
    from upcycle_cli.plan.expand import Growth
    from upcycle_cli.plan.router_inputs import RouterInputs
    from upcycle_cli.plan.tensors import Options

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)

RoutingName = Literal["auto", "softmax-topk", "topk-softmax", "sigmoid-topk"]
_OF_GROWTH = (*("expand", "top_k", "dtype", "expert_layout", "max_shard_size", "untie_embeddings"),)
"""The options that an MoE that is grown has a use for."""
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class MoeOptions:
    """What was asked for; each of these is an option of a command that takes them."""

    recipe: Annotated[
        str | None,
        for_recipe(
            "--recipe",
            "-r",
            metavar="EnGnTn",
            help="Expansion, granularity and top-k in the paper's notation, such as E8G1T2 or "
            "E8G8T8.",
        ),
    ] = None
    expansion: Annotated[
        int | None, for_recipe("--expansion", "-E", help="Expert parameters / MLP parameters.")
    ] = None
    granularity: Annotated[
        int | None,
        for_recipe(
            "--granularity", "-G", help="Dense intermediate size / expert intermediate size."
        ),
    ] = None
    top_k: Annotated[
        int | None, for_recipe("--top-k", "-T", help="Experts that each token uses.")
    ] = None
    expand: Annotated[
        int | None,
        for_recipe(
            help="Grow a source that is an MoE already: each expert becomes so many copies, and "
            "top-k as many times what it is, which is exact. Takes no recipe.",
        ),
    ] = None
    target: Annotated[
        str,
        for_recipe(
            metavar="NAME",
            help="MoE architecture, such as mixtral (`upcycle families` lists them), or "
            f"{SHIPPED}, which ships its code with the model; auto takes the one that most "
            "software loads.",
        ),
    ] = "auto"
    routing: Annotated[
        RoutingName,
        for_recipe(
            metavar="NAME",
            help=f"How gates come from router logits: {any_of(get_args(RoutingName))}; auto does "
            "as the target's released models.",
        ),
    ] = "auto"
    layers: Annotated[
        str | None,
        for_recipe(
            metavar="CHOICE",
            help="Layers that become mixtures of experts, such as 4-31, 0,2,4- or every:2; all "
            "that have an MLP unless given.",
        ),
    ] = None
    scaling: Annotated[
        str,
        for_weights(
            metavar="RULE",
            help="Factors on the experts: exact preserves the function, paper is the cube root on "
            "every matrix, none leaves them as they are, measured (for softmax-topk) makes the "
            "mean gain 1 on the calibration text, a number sets c itself.",
        ),
    ] = "exact"
    scale_split: Annotated[
        ScaleSplit | None,
        for_weights(
            metavar="NAME",
            help="config has the model multiply its gates, where the target can, which is the "
            "default there; balanced shares the factor between up and down, down puts it all on "
            "down.",
        ),
    ] = None
    virtual_groups: Annotated[
        bool,
        for_groups(
            "--virtual-groups/--no-virtual-groups",
            help="One router row per group of G experts, which is the default, or one per expert.",
            metavar="",  # its two names leave no room for a type
            show_default=False,
        ),
    ] = True
    shared_experts: Annotated[
        int,
        for_weights(
            metavar="K",
            help="How many of the G shards are one expert for every token, where the target has "
            "one; the others are routed in groups of G - K, of which --top-k is a multiple.",
        ),
    ] = 0
    neuron_order: Annotated[
        str,
        for_weights(
            metavar="NAME|FILE",
            help="Which neurons of the dense MLP each expert gets: sliced takes them as they come, "
            "shuffled in an order of its own for each virtual group, so that all experts differ, "
            "clustered puts those together that are active together in a calibration, a "
            "safetensors file gives the orders. All are exact.",
        ),
    ] = "sliced"
    noise: Annotated[
        float,
        for_weights(
            metavar="STD",
            help="Add noise of its own to each expert's matrices, of this part of their standard "
            "deviation; 0.01 is a little. The outputs then differ.",
            show_default=False,
        ),
    ] = 0.0
    reinit: Annotated[
        float,
        for_weights(
            metavar="SHARE",
            help="Draw this share of each expert's neurons anew, like those that they replace "
            "(Drop-Upcycling, which takes 0.5). The outputs then differ.",
            show_default=False,
        ),
    ] = 0.0
    router_init: Annotated[
        str,
        for_weights(
            metavar="NAME|FILE",
            help="Rows of the routers: normal draws them, balanced fits them to a calibration so "
            "that experts are chosen evenly, centroids takes clusters of what it sees, a "
            "safetensors file gives them.",
        ),
    ] = "normal"
    calibration: Annotated[
        str | None,
        for_weights(
            metavar="TEXT",
            help="Run the dense model once on a text: a file, JSON Lines, or builtin, which "
            "balanced, centroids, measured and clustered take unless given.",
        ),
    ] = None
    router_logit_std: Annotated[
        float | None,
        for_weights(
            help="Standard deviation of the router's logits, as a calibration measures them where "
            "rows are fitted to one; 0.001 for softmax-topk and 1 for the others unless given."
        ),
    ] = None
    seed: Annotated[
        int, for_weights(help="Seed of routers, shuffled neurons, noise, new neurons.")
    ] = 0
    dtype: Annotated[
        Dtype,
        for_files(
            metavar="DTYPE",
            help=f"Dtype of every tensor: {any_of(get_args(Dtype))}; auto keeps each one's own.",
        ),
    ] = "auto"
    expert_layout: Annotated[
        ExpertLayout | None,
        for_files(
            metavar="NAME",
            help="per-expert writes a tensor per expert, which every engine reads, and is the "
            "default where the target has it; stacked one per matrix and layer, as granitemoe's "
            "and qwen3_vl_moe's releases do; fused one per layer, as transformers 5 holds them.",
        ),
    ] = None
    max_shard_size: Annotated[
        str, for_files(metavar="SIZE", help="Largest file, such as 5GB or 500MB.")
    ] = "5GB"
    untie_embeddings: Annotated[
        bool,
        for_files(
            "--untie-embeddings",
            help="Write the head of a tied model as a tensor of its own (llama.cpp's qwen2moe "
            "needs it).",
        ),
    ] = False

    def to_recipe(self, context: typer.Context, *, allow_inexact: bool) -> Recipe | Growth:
        """Return the recipe; UpcycleError when there is none, or more than one."""
        if self.expand is not None:
            return self._to_growth(context, allow_inexact=allow_inexact)
        return Recipe(
            **_recipe_sizes(context),
            shared_experts=self.shared_experts,
            routing=self.to_routing(),
            layers=self.layers,
            scaling=_parse_scaling(self.scaling),
            scale_split=self.scale_split,
            virtual_groups=self.virtual_groups,
            neuron_order=NeuronOrder.FILE if self._order_file else NeuronOrder(self.neuron_order),
            router_init=RouterInit.FILE if self._router_file else RouterInit(self.router_init),
            router_logit_std=self.router_logit_std,
            noise=self.noise,
            reinit=self.reinit,
            seed=self.seed,
            allow_inexact=allow_inexact,
        )

    def _to_growth(self, context: typer.Context, *, allow_inexact: bool) -> Growth:
        from upcycle_cli.plan.expand import Growth

        refuse_all_but(context, _OF_GROWTH, "--expand copies experts that are there, and takes")
        return Growth(expand=self.expand or 0, top_k=self.top_k, allow_inexact=allow_inexact)

    def to_routing(self) -> Routing | None:
        """Return the routing, None for what the target does."""
        return None if self.routing == "auto" else Routing(self.routing)

    def to_inputs(self, prompts: Path | None = None) -> RouterInputs:
        """Return what routers are made from; UpcycleError for a text or a file that is none."""
        from upcycle_cli.plan.router_inputs import RouterInputs

        return RouterInputs.read(
            calibration=self.calibration, rows=self._router_file, prompts=prompts
        )

    @property
    def _router_file(self) -> Path | None:
        names = {*RouterInit} - {RouterInit.FILE}
        return None if self.router_init in names else Path(self.router_init)

    def to_options(self) -> Options:
        """Return what is wanted of the files."""
        from upcycle_cli.plan.tensors import Options

        orders = None
        if self._order_file is not None:
            from upcycle_cli.plan.permutation_file import read_order_file

            orders = read_order_file(self._order_file)
        return Options(
            dtype=None if self.dtype == "auto" else self.dtype,
            expert_layout=self.expert_layout,
            max_shard_bytes=parse_size(self.max_shard_size),
            untie_embeddings=self.untie_embeddings,
            neuron_orders=orders,
        )

    @property
    def _order_file(self) -> Path | None:
        names = {*NeuronOrder} - {NeuronOrder.FILE}
        return None if self.neuron_order in names else Path(self.neuron_order)


def takes_moe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options in the place of its parameter `moe`, which gets their values."""
    options = inspect.signature(MoeOptions, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:  # noqa: ANN401 - as typer has them
        moe = MoeOptions(**{name: given.pop(name) for name in options})
        command(**given, moe=moe)

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        parameters += options.values() if each.name == "moe" else [each]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def refuse_all_but(context: typer.Context, names: Sequence[str], words: str) -> None:
    """Raise UpcycleError, which begins with `words`, for options that go with a recipe only."""
    odd = [each.name for each in fields(MoeOptions) if each.name not in names]
    given = [_flag(name) for name in odd if is_given(context, name)]
    if given:
        taken = [_flag(name) for name in names if name != "expand"]
        raise UpcycleError(
            f"{words} no {', no '.join(given)}.",
            f"Leave that out; what can be given is {', '.join(taken[:-1])} and {taken[-1]}.",
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def asks_for_moe(context: typer.Context) -> bool:
    """Whether a recipe is given; UpcycleError when there are only options for one."""
    asks = is_given(context, "recipe", "expand", *SIZES)
    if not asks and is_given(context, *(each.name for each in fields(MoeOptions))):
        raise UpcycleError(
            "these options say how to convert, and no --recipe does.",
            "Add --recipe E8G1T2, or --expand 2 for an MoE.",
        )
    return asks


def _recipe_sizes(context: typer.Context) -> dict[str, int]:
    """Return E, G and T of file, variables and command line, each over the former; UpcycleError."""
    found: dict[str, int] = {}
    for source in ("DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE"):
        names = [name for name in ("recipe", *SIZES) if source_of(context, name) == source]
        given = {name: context.params[name] for name in names}
        if "recipe" in given:
            if len(given) > 1:
                words = "--recipe says expansion, granularity and top-k already."
                raise UpcycleError(words, "Use one or the other.")
            given = dict(zip(SIZES, parse_recipe_name(given["recipe"]), strict=True))
        found |= given
    missing = [_flag(name) for name in SIZES if name not in found]
    if missing:
        raise UpcycleError(
            f"{' and '.join(missing)} missing." if found else "no recipe.",
            "Give --recipe E8G1T2 (8 experts, 2 active), or --expansion, --granularity and "
            "--top-k; for a source that is an MoE already, --expand 2.",
        )
    return found


def _parse_scaling(text: str) -> Scaling | float:
    if text in set(Scaling):
        return Scaling(text)
    try:
        return float(text)
    except ValueError:
        raise UpcycleError(
            f"--scaling '{text}' is neither exact, paper, none, measured nor a number."
        ) from None


def parse_size(text: str, option: str = "--max-shard-size", like: str = "5GB or 500MB") -> int:
    """Read a size in bytes; raises UpcycleError, which names the option, for another text."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UpcycleError(f"{option} '{text}' is not a size.", f"Write {like}.")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper() or " ")
    size = float(number) * (1024 if binary else 1000) ** power
    if not math.isfinite(size):
        raise UpcycleError(f"{option} '{text[:20]}…' is too large.", f"Write {like}.")
    return int(size)

"""Turn a dense Hugging Face checkpoint into a Mixture of Experts, and prove that it is the same.

The command line does what these functions do:

    from upcycle_cli import Recipe, convert, verify

    convert("dense", "moe", Recipe(expansion=8, granularity=1, top_k=2))
    assert verify("dense", "moe").passed
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcycle_cli.checkpoint import open_checkpoint as open_checkpoint
    from upcycle_cli.errors import UpcycleError as UpcycleError
    from upcycle_cli.growth import Growth as Growth
    from upcycle_cli.hub.pushing import Destination as Destination
    from upcycle_cli.inspection import inspect as inspect
    from upcycle_cli.plan import build_plan as build_plan
    from upcycle_cli.recipe import Recipe as Recipe
    from upcycle_cli.request import MergeRequest as MergeRequest
    from upcycle_cli.request import convert as convert
    from upcycle_cli.tensors import Options as Options
    from upcycle_cli.verification import verify as verify
    from upcycle_cli.writer import WriteOptions as WriteOptions

_PLACES = {
    "Destination": "hub.pushing",
    "MergeRequest": "request",
    "Growth": "growth",
    "Options": "tensors",
    "Recipe": "recipe",
    "UpcycleError": "errors",
    "WriteOptions": "writer",
    "build_plan": "plan",
    "convert": "request",
    "inspect": "inspection",
    "open_checkpoint": "checkpoint",
    "verify": "verification",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> object:
    """Import what is asked for: the command line takes signals before anything large is here."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)

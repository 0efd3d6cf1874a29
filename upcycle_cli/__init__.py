"""Turn a dense Hugging Face checkpoint into a Mixture of Experts, and prove that it is the same.

The command line does what these functions do:

    from upcycle_cli import Recipe, convert, verify

    convert("dense", "moe", Recipe(expansion=8, granularity=1, top_k=2))
    assert verify("dense", "moe").passed
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcycle_cli.api import convert as convert
    from upcycle_cli.checkpoint.checkpoint import open_checkpoint as open_checkpoint
    from upcycle_cli.core.errors import UpcycleError as UpcycleError
    from upcycle_cli.inspection.summary import inspect as inspect
    from upcycle_cli.plan.merge import MergeRequest as MergeRequest
    from upcycle_cli.plan.output import Options as Options
    from upcycle_cli.plan.upcycle import build_plan as build_plan
    from upcycle_cli.publish.push import Destination as Destination
    from upcycle_cli.recipe.recipe import Growth as Growth
    from upcycle_cli.recipe.recipe import Recipe as Recipe
    from upcycle_cli.verification.verify import verify as verify
    from upcycle_cli.write.writer import WriteOptions as WriteOptions

_PLACES = {
    "Destination": "publish.push",
    "MergeRequest": "plan.merge",
    "Growth": "recipe.recipe",
    "Options": "plan.output",
    "Recipe": "recipe.recipe",
    "UpcycleError": "core.errors",
    "WriteOptions": "write.writer",
    "build_plan": "plan.upcycle",
    "convert": "api",
    "inspect": "inspection.summary",
    "open_checkpoint": "checkpoint.checkpoint",
    "verify": "verification.verify",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> object:
    """Import what is asked for: the command line takes signals before anything large is here."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)

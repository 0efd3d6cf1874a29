"""Turn a dense Hugging Face checkpoint into a Mixture of Experts, and prove that it is the same.

The command line does what these functions do:

    from upcycle_cli import convert, inspect, push, verify

    print(inspect("dense", "E8G1T2").summary())  # reads headers only
    convert("dense", "moe", "E8G1T2")
    assert verify("dense", "moe").passed
    push("moe", "my-org/moe", private=True)

Sources are directories or repos on the Hub. Every function raises UpcycleError for what the caller
can fix. Results have a `summary()`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcycle_cli.api import convert as convert
    from upcycle_cli.checkpoint.checkpoint import open_checkpoint as open_checkpoint
    from upcycle_cli.core.errors import UpcycleError as UpcycleError
    from upcycle_cli.core.version import __version__ as __version__
    from upcycle_cli.inspection.summary import inspect as inspect
    from upcycle_cli.models.overview import families as families
    from upcycle_cli.plan.merge import MergeRequest as MergeRequest
    from upcycle_cli.plan.output import Options as Options
    from upcycle_cli.plan.upcycle import build_plan as build_plan
    from upcycle_cli.publish.push import Destination as Destination
    from upcycle_cli.publish.push import push as push
    from upcycle_cli.recipe.recipe import Growth as Growth
    from upcycle_cli.recipe.recipe import Recipe as Recipe
    from upcycle_cli.training import tie_virtual_groups as tie_virtual_groups
    from upcycle_cli.verification.engines import EngineOptions as EngineOptions
    from upcycle_cli.verification.prompts import TextOptions as TextOptions
    from upcycle_cli.verification.verify import verify as verify
    from upcycle_cli.write.writer import WriteOptions as WriteOptions

_PLACES = {
    "Destination": "publish.push",
    "EngineOptions": "verification.engines",
    "Growth": "recipe.recipe",
    "MergeRequest": "plan.merge",
    "Options": "plan.output",
    "Recipe": "recipe.recipe",
    "TextOptions": "verification.prompts",
    "UpcycleError": "core.errors",
    "WriteOptions": "write.writer",
    "__version__": "core.version",
    "build_plan": "plan.upcycle",
    "convert": "api",
    "families": "models.overview",
    "inspect": "inspection.summary",
    "open_checkpoint": "checkpoint.checkpoint",
    "push": "publish.push",
    "tie_virtual_groups": "training",
    "verify": "verification.verify",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> object:
    """Import a name on first use: the command line handles signals before anything large loads."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

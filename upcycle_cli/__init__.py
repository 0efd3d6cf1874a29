"""Turn a dense Hugging Face checkpoint into a Mixture of Experts, and prove that it is the same.

The command line does what these functions do:

    from upcycle_cli import Recipe, convert, verify

    convert("dense", "moe", Recipe(expansion=8, granularity=1, top_k=2))
    assert verify("dense", "moe").passed
"""

from upcycle_cli.checkpoint import open_checkpoint
from upcycle_cli.conversion import convert
from upcycle_cli.errors import UpcycleError
from upcycle_cli.inspection import inspect
from upcycle_cli.outputs import Options
from upcycle_cli.plan import build_plan
from upcycle_cli.recipe import Recipe
from upcycle_cli.verification import verify

__all__ = [
    "Options",
    "Recipe",
    "UpcycleError",
    "build_plan",
    "convert",
    "inspect",
    "open_checkpoint",
    "verify",
]

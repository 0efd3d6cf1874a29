"""How an MoE grows: what the user decides."""

from __future__ import annotations

from dataclasses import dataclass

from upcycle_cli.core.errors import UpcycleError


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Duplicate each expert `expand` times and let a token use `top_k` of them.

    A `top_k` of None means `expand` times the source's, which is exact. Raises UpcycleError for
    values that no MoE can have.
    """

    expand: int
    top_k: int | None = None
    allow_inexact: bool = False

    def __post_init__(self) -> None:
        if self.expand < 2:
            raise UpcycleError(
                f"--expand must be at least 2, not {self.expand}.", "2 doubles the experts."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UpcycleError(f"top-k (T) must be at least 1, not {self.top_k}.")

"""`upcycle families`: the supported model types, their targets, engines and trainers."""

from __future__ import annotations

from upcycle_cli.cli import options, render
from upcycle_cli.cli.terminal import print_json, show, talk

_option = options.options_of("families")


def families(
    name: str | None = _option("name", None),
    *,
    targets: bool = _option("targets", False),
    json: bool = options.JSON,
) -> None:
    """List the supported model types, or what one of them can become.

    Example:
      upcycle families qwen3
    """
    from upcycle_cli.cli.render_json import overview_json
    from upcycle_cli.models.overview import families as supported
    from upcycle_cli.models.overview import only

    found = supported() if name is None else only(supported(), name)
    if json:
        print_json(overview_json(found))
    elif name is not None:
        show(*render.family_tables(found))
    elif targets:
        show(*render.target_tables(found.targets))
    else:
        show(found)
        talk("", "Next: upcycle families NAME shows targets, engines and trainers, or the reason.")

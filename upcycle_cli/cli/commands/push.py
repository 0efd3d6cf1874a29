"""`upcycle push`: upload a finished conversion to the Hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from upcycle_cli.cli import options, render
from upcycle_cli.cli.process import raise_signal
from upcycle_cli.cli.progress import progress_bar
from upcycle_cli.cli.terminal import print_json


@options.declared
def push(
    directory: Path,
    repo: str,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    message: str | None = None,
    replace_card: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Push a finished conversion to a repo on the Hugging Face Hub.

    Refuses an incomplete one. Files that the repo already has are not sent again.

    Example:
      upcycle push moe my-org/Llama-3.1-8B-E8G1T2 --private
    """
    from upcycle_cli.cli.render_json import push_json
    from upcycle_cli.publish.push import push as push_directory

    with progress_bar(silent=quiet or json) as display:
        display.begins("pushing")
        done = push_directory(
            directory,
            repo,
            revision=revision,
            private=private,
            create_pr=create_pr,
            message=message,
            replace_card=replace_card,
            on_start=None if quiet or json else partial(render.announce_push, repo),
        )
    raise_signal()
    if json:
        print_json(push_json(done))
    elif not quiet:
        render.show_push(done)

"""`upcycle push`: upload a finished conversion to the Hub."""

from __future__ import annotations

from pathlib import Path

import typer

from upcycle_cli.cli import messages, options
from upcycle_cli.cli.options import for_hub, path_argument
from upcycle_cli.cli.process import raise_signal
from upcycle_cli.cli.terminal import errors_to_exit_codes, print_json


def push(
    directory: Path = path_argument(..., metavar="DIR", help="The output of `upcycle convert`."),
    repo: str = typer.Argument(
        ..., metavar="REPO", help="ORG/NAME on the Hub; created if it does not exist."
    ),
    revision: str | None = for_hub(
        None,
        metavar="REV",
        help="Branch to push to, created if it does not exist; refs/pr/N adds to a pull request.",
    ),
    private: bool = options.PRIVATE,
    create_pr: bool = options.CREATE_PR,
    message: str | None = for_hub(None, "--message", "-m", help="First line of the commit."),
    replace_card: bool = for_hub(
        False, "--replace-card", help="Replace the repo's README.md even if it was edited there."
    ),
    json: bool = options.JSON,
    quiet: bool = options.QUIET,
) -> None:
    """Push a finished conversion to a repo on the Hugging Face Hub.

    Refuses an incomplete one. Files that the repo already has are not sent again.

    Example: upcycle push Llama-3.1-8B-E8G1T2 my-org/Llama-3.1-8B-E8G1T2 --private
    """
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli.cli.render_json import push_json
        from upcycle_cli.publish.push import Destination
        from upcycle_cli.publish.push import push as push_directory

        silent = quiet or json
        messages.show_hub_bars(silent=silent)
        destination = Destination(
            repo=repo,
            revision=revision,
            private=private,
            create_pr=create_pr,
            message=message,
            replace_card=replace_card,
        )

        def announce(files: int, nbytes: int) -> None:
            if not silent:
                messages.announce_push(repo, files, nbytes)

        done = push_directory(directory, destination, on_start=announce)
        raise_signal()
        if json:
            print_json(push_json(done))
        elif not quiet:
            messages.show_push(done)

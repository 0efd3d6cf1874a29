"""`upcycle push`: a finished conversion to the Hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from upcycle_cli.cli import shared_options as shared
from upcycle_cli.cli.process import raise_signal
from upcycle_cli.cli.shared_options import for_hub, for_path
from upcycle_cli.cli.terminal import errors_to_exit_codes, print_json


def push(
    directory: Annotated[Path, for_path(metavar="DIR", help="What `upcycle convert` has made.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="ORG/NAME on the Hub; made if it is not there.")
    ],
    revision: Annotated[
        str | None,
        for_hub(
            metavar="REV",
            help="Branch to push to, made if it is not there; refs/pr/N goes on with a pull "
            "request.",
        ),
    ] = None,
    private: shared.PrivateOption = False,
    create_pr: shared.PullRequestOption = False,
    message: Annotated[
        str | None, for_hub("--message", "-m", help="First line of the commit.")
    ] = None,
    replace_card: Annotated[
        bool,
        for_hub(
            "--replace-card", help="Replace the repo's README.md even where it was edited there."
        ),
    ] = False,
    json: shared.JsonOption = False,
    quiet: shared.QuietOption = False,
) -> None:
    """Push a finished conversion to a repo on the Hugging Face Hub.

    Refuses what is not complete. Files that are there already are not sent again.

    Example: upcycle push Llama-3.1-8B-E8G1T2 my-org/Llama-3.1-8B-E8G1T2 --private
    """
    with errors_to_exit_codes(as_json=json):
        from upcycle_cli.cli.render import push_json
        from upcycle_cli.publish.push import Destination
        from upcycle_cli.publish.push import push as push_directory

        shared.quiet_hub(silent=quiet or json)
        destination = Destination(
            repo=repo,
            revision=revision,
            private=private,
            create_pr=create_pr,
            message=message,
            replace_card=replace_card,
        )
        announce = functools.partial(shared.announce_push, repo, silent=quiet or json)
        done = push_directory(directory, destination, on_start=announce)
        raise_signal()
        if json:
            print_json(push_json(done))
        elif not quiet:
            shared.show_push(done)

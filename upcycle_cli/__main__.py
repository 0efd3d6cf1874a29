"""`python -m upcycle_cli`, and the `upcycle` command."""

from upcycle_cli.cli.startup import begin, give_up


def main() -> None:
    """Run the command line."""
    begin()
    try:
        from upcycle_cli.cli.app import main as run
    except Exception as error:  # noqa: BLE001 - Python's exit code for it would be 1
        give_up(error)
    run()


if __name__ == "__main__":
    main()

"""`python -m upcycle_cli`, and the `upcycle` command."""

from upcycle_cli.cli import main

if __name__ == "__main__":
    main()

"""`python -m upcycle_cli`, and the `upcycle` command."""

from upcycle_cli.cli import process


def main() -> None:
    """Run the command line."""
    try:
        process.start()
        from upcycle_cli.cli.app import main as run
    except process.StoppedError:
        code, word = process.stopped()
        process.print_error(f"{word}.")
        process.finish(code)
    except (ImportError, MemoryError, OSError) as error:  # Python would exit with 1
        process.print_error(f"upcycle cannot start: {error or 'not enough memory'}.")
        process.finish(process.EXIT_ERROR)
    run()


if __name__ == "__main__":
    main()

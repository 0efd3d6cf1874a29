"""`python -m upcycle_cli`, and the `upcycle` command."""

import traceback

from upcycle_cli.cli import process


def main() -> None:
    """Run the command line, and end the process with an exit code."""
    code = process.EXIT_BUG  # not 1, which means that a verification failed
    try:
        process.start()
        from upcycle_cli.cli.app import app

        app(prog_name="upcycle")
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else process.EXIT_BUG
    except process.StoppedError:  # before a command began, or during another signal's message
        code, word = process.stopped()
        process.print_error(f"{word}.")
    except (ImportError, MemoryError, OSError) as error:  # commands catch their own
        code = process.EXIT_ERROR
        process.print_error(f"upcycle cannot start: {error or 'not enough memory'}.")
    except BaseException:  # noqa: BLE001 - a bug
        from upcycle_cli.cli import terminal

        terminal.talk(*traceback.format_exc().splitlines())
        terminal.talk("", "This is a bug in upcycle. Please report it with the lines above.")
    finally:
        process.finish(code)


if __name__ == "__main__":
    main()

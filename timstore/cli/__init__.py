"""The command line: a verb parses what it is given, calls the public API, and prints.

What a verb needs beyond reading and SQL, torch above all, it imports when it runs.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import timstore
from timstore.cli import reading, writing
from timstore.cli.terminal import DAMAGED, spelled
from timstore.errors import FormatError, NotFoundError, TimstoreError, TimstoreWarning

__all__ = ["app", "main"]

ERROR, NOT_FOUND = 1, 5
# As a shell reports a process that SIGINT or SIGPIPE ended.
INTERRUPTED, PIPE_CLOSED = 130, 141


class Reported(TyperGroup):
    """Verbs whose errors and warnings are sentences on stderr, and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that the context names."""
        with reported():
            return super().invoke(ctx)


app = typer.Typer(
    name="timstore",
    cls=Reported,
    no_args_is_help=True,
    # Its tables leave half of 80 columns to the text.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Data goes to stdout, everything else to stderr; --json prints one JSON object per line. "
        "Exit codes: 0 done, 1 error, 2 wrong usage, 3 damaged store, 5 not found. "
        "TIMSTORE_TRACEBACK=1 shows where an error came from."
    ),
)
app.add_typer(reading.verbs)
app.add_typer(writing.verbs)
app.add_typer(writing.samples, name="samples")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(timstore.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Look into a store of training trajectories, keep it, and roll samples back."""


def main() -> None:
    """Run the command line and end the process; the entry point `timstore`."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A parameter or a column may be named in what the terminal cannot show, a question hold what is no text.
        getattr(stream, "reconfigure", lambda errors: None)(errors="backslashreplace")
    try:
        app(prog_name="timstore")
    finally:
        # What a store could not write was said; said again at the end of the process it is no news.
        warnings.simplefilter("ignore", TimstoreWarning)


@contextmanager
def reported() -> Iterator[None]:
    """Turn errors that are no bugs of ours into `typer.Exit`, and print warnings as one line each."""
    show_other = warnings.showwarning

    def show(message: Any, category: Any, *place: Any, **more: Any) -> None:
        if issubclass(category, TimstoreWarning):
            typer.echo(f"warning: {spelled(str(message))}", err=True)
        else:
            show_other(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            _tell_done(error)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Who read has seen enough. The interpreter flushes once more when it ends, into nothing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None
        except (TimstoreError, OSError) as error:
            if os.environ.get("TIMSTORE_TRACEBACK", "") not in ("", "0"):
                raise
            typer.echo(f"error: {_sentence(error)}", err=True)
            _tell_done(error)
            raise typer.Exit(_exit_code(error)) from None


def _exit_code(error: Exception) -> int:
    if isinstance(error, FormatError):
        return DAMAGED
    return NOT_FOUND if isinstance(error, NotFoundError | FileNotFoundError) else ERROR


def _sentence(error: Exception) -> str:
    """Return the error's own words, as a command line spells them; those of the system are short of the file."""
    if isinstance(error, OSError) and not isinstance(error, TimstoreError):
        # Files are opened by name; without one it is what a verb prints to.
        return f"{error.filename or 'the output could not be written'}: {error.strerror}"
    return spelled(str(error))


def _tell_done(error: BaseException) -> None:
    """Say what was done before an error or an interrupt came, where that is known."""
    if hasattr(error, "report"):
        for sentence in (*error.__notes__, *([] if error.report is None else [str(error.report)])):
            typer.echo(spelled(sentence), err=True)

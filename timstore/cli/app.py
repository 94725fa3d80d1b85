"""The verbs, put together."""

import atexit
import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated, ClassVar, NoReturn

import typer

import timstore
from timstore.cli.failures import ERROR
from timstore.cli.verbs import Verbs
from timstore.errors import TimstoreWarning


class Root(Verbs):
    """The verbs of `timstore`."""

    modules: ClassVar = {
        "info": "info",
        "sql": "sql",
        "rollback": "rollback",
        "verify": "verify",
        "compact": "compact",
        "forecast": "forecast",
        "import": "importing",
        "export": "exporting",
        "samples": "samples",
    }


app = typer.Typer(
    name="timstore",
    cls=Root,
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


def main() -> NoReturn:
    """Run the command line and end the process; the entry point `timstore`."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A parameter or a column may be named in what the terminal cannot show, a question hold what is no text.
        getattr(stream, "reconfigure", lambda errors: None)(errors="backslashreplace")
    code = 0
    try:
        app(prog_name="timstore")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    if code == ERROR:
        # What a store could not write was said; said again at its end it is no news.
        warnings.simplefilter("ignore", TimstoreWarning)
    # Everything is closed by now. What the interpreter does beyond this, object by object, takes a tenth of the time.
    atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)

"""What becomes of errors: a sentence on stderr and an exit code."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from timstore.cli.spelling import spelled
from timstore.errors import FormatError, NotFoundError, TimstoreError, TimstoreWarning

ERROR, DAMAGED, NOT_FOUND = 1, 3, 5
# As a shell reports a process that SIGINT or SIGPIPE ended.
INTERRUPTED, PIPE_CLOSED = 130, 141


@contextmanager
def reported() -> Iterator[None]:
    """Turn errors that are no bugs of ours into `typer.Exit`, and print warnings as one line each."""
    with warnings.catch_warnings():
        warnings.showwarning = _warn
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
            typer.echo(f"error: {_said(error)}", err=True)
            _tell_done(error)
            raise typer.Exit(exit_code(error)) from None


def exit_code(error: Exception) -> int:
    """Return what the process ends with."""
    if isinstance(error, FormatError):
        return DAMAGED
    return NOT_FOUND if isinstance(error, NotFoundError | FileNotFoundError) else ERROR


def _said(error: Exception) -> str:
    """Return the error's own words, as a command line spells them; those of the system are short of the file."""
    if isinstance(error, OSError) and not isinstance(error, TimstoreError):
        # Files are opened by name; without one it is what a verb prints to.
        return f"{error.filename or 'the output could not be written'}: {error.strerror}"
    return spelled(str(error))


def _tell_done(error: BaseException) -> None:
    """Say what was done before an error or an interrupt came, where that is known."""
    if hasattr(error, "report"):
        for said in (*error.__notes__, *([] if error.report is None else [str(error.report)])):
            typer.echo(spelled(said), err=True)


_shown_before = warnings.showwarning


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if issubclass(category, TimstoreWarning):
        typer.echo(f"warning: {spelled(str(message))}", err=True)
    else:
        _shown_before(message, category, filename, lineno, file, line)

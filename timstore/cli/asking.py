"""Asking before something changes that cannot be taken back."""

import sys

import typer


def confirm(what: str, yes: bool) -> None:
    """Return if the person says yes to what is about to be done, or said so before.

    Raises:
        typer.BadParameter: nobody is there to be asked.
        typer.Abort: the person says no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{what}, and nobody can be asked whether that is right: pass --yes")
    typer.confirm(f"{what}. Go on?", abort=True, err=True)
